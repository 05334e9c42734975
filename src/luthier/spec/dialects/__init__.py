"""Other systems' job files, translated at the border into tables of a run spec."""
