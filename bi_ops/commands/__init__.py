"""The subcommands of `bi-ops`: each module adds its parser and runs it."""
