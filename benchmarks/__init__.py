"""disttrain beside the frameworks one would use instead; measured by `disttrain bench`.

A workload is a file in `workloads`: an architecture, sizes, an optimizer. A system is a file in `systems`: it
makes any workload's model from the same description and the same initial weights. A task is a file in `tasks`:
what of such a model is measured. The file's name is its registration. Each system runs in processes of its own
(`worker`), on one core that all share; the program (`program`) asks one after the other for a slice, round after
round, so that whatever slows the machine down slows all of them.

This folder belongs to the repository and is not installed.
"""
