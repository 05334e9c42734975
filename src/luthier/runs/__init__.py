"""Run folders, the home folder, and where names of models lead."""
