"""The competitors: each module is a program of its own, run in the environment that has its library.

Nothing here is imported by the harness. A worker may import the standard library, torch, `protocol`, `measure` and
`marks` beside its own library, and nothing else of this folder, because its environment may lack everything else.
"""
