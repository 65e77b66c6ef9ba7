"""The functions and classes that `import hesstrace_cli` gives: the commands' own, for any loop."""
