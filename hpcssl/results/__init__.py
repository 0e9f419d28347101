"""From run folders to tables and pictures. Every number is read, none is typed in."""
