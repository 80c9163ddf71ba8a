"""pluggy's markers of this project: `hookimpl` marks a plugin's functions."""

import pluggy

PROJECT = "kvbench"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
