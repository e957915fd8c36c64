"""Operations of a whole stack of blocks for one shape of input, and running them on threads."""
