"""The commands of `fira`: one module per subcommand, called by the scripts in scripts/ as well.

The module of a command parses its arguments without torch and numpy, whose import takes seconds. Whatever needs them is
imported after the arguments have been parsed.
"""
