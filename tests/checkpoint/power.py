"""What a disk may hold after a loss of power: a model of which operations are durable, and all states that it allows.

Of a file that was written since it was last flushed there may be what was written, what there was before, half of it,
or zeros. Of the changes to the names of a directory that were made since it was last flushed there may be any: POSIX
promises no order. A journal that commits in order (ext4) allows fewer states.

Source: Pillai et al., "All file systems are not created equal: on the complexity of crafting crash-consistent
applications", OSDI 2014.
"""

import itertools
import os
import random

LIMIT = 1000  # states of one moment; beyond it a seeded sample


class Disk:
    """A directory, and what of it is durable; paths begin with "/" and are relative to it, which itself is ""."""

    def __init__(self):
        self.names = {0: {}}  # of each directory, by inode: what is in it
        self.durable = {0: {}}
        self.pending = {0: []}  # changes of names, in order
        self.content, self.flushed = {}, {}  # of files, by inode
        self.inodes = itertools.count(1)

    def find(self, path):
        """Return the inode of a path, and that of the directory and the name in it."""
        parts = path.lstrip("/").split("/")
        parent = 0
        for part in parts[:-1]:
            parent = self.names[parent][part]
        return self.names[parent].get(parts[-1]), parent, parts[-1]

    def change(self, directory, changes):
        self.pending[directory].append(changes)
        apply(self.names[directory], changes)

    def do(self, kind, path, *rest):
        if kind == "sync":
            inode = self.find(path)[0] if path else 0
            if inode in self.names:
                self.durable[inode] = dict(self.names[inode])
                self.pending[inode] = []
            else:
                self.flushed[inode] = self.content[inode]
            return
        inode, parent, name = self.find(path)
        if kind in ("mkdir", "create"):
            new = next(self.inodes)
            if kind == "mkdir":
                self.names[new], self.durable[new], self.pending[new] = {}, {}, []
            else:
                self.content[new], self.flushed[new] = b"", b""
            self.change(parent, {name: new})
        elif kind == "write":
            self.content[inode] += rest[0]
        elif kind in ("unlink", "rmdir"):
            self.change(parent, {name: None})
        else:
            _, other, new_name = self.find(rest[0])
            assert other == parent  # else it would change two directories at once
            self.change(parent, {name: None, new_name: inode})

    def states(self, seed):
        """Yield what may be there after a loss of power now: contents by path, None for a directory."""
        files = [inode for inode in self.content if self.content[inode] != self.flushed[inode]]
        choices = [[(inode, data) for data in self.possible(inode)] for inode in files]
        for directory, changes in self.pending.items():
            choices += [[((directory, number), False), ((directory, number), True)] for number in range(len(changes))]
        count = 1
        for each in choices:
            count *= len(each)
        chance = random.Random(seed)
        picks = (
            itertools.product(*choices) if count <= LIMIT
            else ([chance.choice(each) for each in choices] for _ in range(LIMIT))
        )  # fmt: skip
        for pick in picks:
            yield self.state(dict(pick))

    def possible(self, inode):
        full = self.content[inode]
        return {full, self.flushed[inode], full[: len(full) // 2], b"\0" * len(full)}

    def state(self, pick):
        found = {}

        def walk(directory, path):
            names = dict(self.durable[directory])
            for number, changes in enumerate(self.pending[directory]):
                if pick[directory, number]:
                    apply(names, changes)
            for name, inode in names.items():
                if inode in self.names:
                    found[f"{path}/{name}"] = None
                    walk(inode, f"{path}/{name}")
                else:
                    found[f"{path}/{name}"] = pick.get(inode, self.flushed[inode])

        walk(0, "")
        return found


def apply(names, changes):
    for name, inode in changes.items():
        if inode is None:
            names.pop(name, None)
        else:
            names[name] = inode


def put(state, folder):
    """Make the files and directories of a state in an empty folder."""
    for path in sorted(state):
        if state[path] is None:
            os.mkdir(f"{folder}{path}")
        else:
            with open(f"{folder}{path}", "wb") as file:
                file.write(state[path])
