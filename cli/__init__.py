"""What only a command line needs: flags, files of data, rewards by name, folders of runs, tables.

Nothing here has to be read to follow an algorithm, and nothing above the last ruler of a script
uses it. Commands: python -m cli.chat, cli.collect, cli.export.
"""
