"Fixed inputs and the outputs that the original implementations give for them: the same numbers must come out here."
