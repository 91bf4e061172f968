"""The functions of other libraries, on arrays of any: one file per library, nothing imported before it is asked for."""
