"""Ratios against what anyone could run instead, from paired runs on this machine: `dspark bench`.

One module a row in `rows`, which is found by its name; `paired` runs arms in turns and makes the intervals, `bench`
holds what rows share, `command` reads the options and writes the results. Nothing here decides anything for a stage.
"""
