"""cyflash: FlashAttention for people who hold arrays."""
