"""The commands of `fira`: one module per subcommand, called by the scripts in scripts/ as well."""
