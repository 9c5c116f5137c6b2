"""Pages and text from results. Draws what it is given: imports no numerics, network or flow."""
