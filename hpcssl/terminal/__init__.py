"""What the commands write to a terminal: help pages, tables and progress, at the width that there is."""
