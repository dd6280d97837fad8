"""The program `disttrain`: starts jobs and looks after them. Nothing imports this package."""
