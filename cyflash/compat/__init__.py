"""The functions of other libraries, on NumPy arrays: one file per library, nothing imported before it is asked for."""
