"""Runs in a container of the crash test and uses its root file system in every way an
application can, for as long as it lives. An error of the file system, or a byte that
is not what it must be, ends it and is told in /crash/error.

/crash is a folder of the host:
  log    what was about to be written ("i") and what was flushed ("a"), a line each:
         i|a KIND SLOT ITEM VERSION
  beat   files read, operations flushed
  ready  made when all that the log says was found in place at start
  error  the first error

Started again on the same files, by the same log, it first verifies that what was
flushed is there.
"""
import hashlib
import os
import random
import struct
import threading
import time
import traceback

OUT = "/crash"
DATA = "/var/lib/load"
SUMS = "/srv/crash/sums"
ALTERED = "/usr/share/doc/"  # files of the image that are changed, moved and removed
PAGE = 4096
PAGES = 128
LIMITS = {"page": 3, "whole": 8, "life": 12, "tree": 4, "image": 48, "grown": 2}  # slots of each kind

counts = {"read": 0, "flushed": 0}


def fail(what):
    text = what + "\n" + traceback.format_exc()
    fd = os.open(OUT + "/error", os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
    os.write(fd, text.encode())
    print(text, flush=True)
    os._exit(1)


class Wrong(Exception):
    pass


def fsync_dir(path):
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(path, data):
    fd = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view):]
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_tree(path):
    # Not shutil's: it compares inode numbers, which an overlay's directory changes when
    # the kernel forgets it.
    for entry in os.scandir(path):
        if entry.is_dir(follow_symlinks=False):
            remove_tree(entry.path)
        else:
            os.unlink(entry.path)
    os.rmdir(path)


def read_file(path):
    """Reads a file, and makes the next read come from below."""
    fd = os.open(path, os.O_RDONLY)
    try:
        parts = []
        while part := os.read(fd, 1 << 20):
            parts.append(part)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return b"".join(parts)
    finally:
        os.close(fd)


def expect(path, want, what):
    got = read_file(path)
    if got != want:
        at = next((i for i, (x, y) in enumerate(zip(got, want)) if x != y), min(len(got), len(want)))
        raise Wrong(f"{path}: {len(got)} bytes, want the {len(want)} of {what}; they differ at {at}: "
                    f"{got[at:at + 16].hex()} instead of {want[at:at + 16].hex()}")


def expect_gone(path):
    if os.path.lexists(path):
        raise Wrong(f"{path} is there and was removed")


def content(kind, slot, version):
    """What a file of a slot holds in a version: up to 200 kB."""
    seed = f"{kind} {slot} {version}".encode()
    size = int.from_bytes(hashlib.sha256(seed).digest()[:4], "little") % 200_000
    return hashlib.shake_128(seed).digest(size)


def page(slot, item, version):
    if version == 0:
        return bytes(PAGE)
    return hashlib.shake_128(f"page {slot} {item} {version}".encode()).digest(PAGE - 8) + struct.pack("<Q", version)


class Log:
    """What was flushed last of each (kind, slot, item), and what was begun."""

    def __init__(self):
        self.acked, self.begun = {}, {}
        try:
            with open(OUT + "/log", encoding="ascii") as f:
                for line in f:
                    what, kind, slot, item, version = line.split()
                    key = kind, int(slot), int(item)
                    (self.acked if what == "a" else self.begun)[key] = int(version)
        except FileNotFoundError:
            pass
        self.fd = os.open(OUT + "/log", os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)

    def begin(self, *entries):
        os.write(self.fd, "".join(f"i {k} {s} {i} {v}\n" for (k, s, i), v in entries).encode())
        self.begun.update(entries)

    def ack(self, *entries):
        os.write(self.fd, "".join(f"a {k} {s} {i} {v}\n" for (k, s, i), v in entries).encode())
        self.acked.update(entries)
        counts["flushed"] += 1

    def at(self, key):
        return self.acked.get(key, 0)

    def in_flight(self, key):
        return self.begun.get(key, 0) != self.at(key)


# One class for each kind of thing that is written. step changes a slot and flushes;
# verify compares it with its last flushed version; settle does so after a start, when
# an operation may have been cut off in the middle.

class Pages:
    """Pages of a file, overwritten in place."""
    kind = "page"

    def __init__(self, log):
        self.log = log

    def path(self, slot):
        return f"{DATA}/page{slot}"

    def open(self, slot):
        fd = os.open(self.path(slot), os.O_CREAT | os.O_RDWR, 0o644)
        if os.fstat(fd).st_size != PAGE * PAGES:
            if any(self.log.at((self.kind, slot, i)) for i in range(PAGES)):
                raise Wrong(f"{self.path(slot)} has {os.fstat(fd).st_size} bytes")
            os.ftruncate(fd, PAGE * PAGES)
            os.fsync(fd)
            fsync_dir(DATA)
        return fd

    def step(self, slot, rnd):
        fd = self.open(slot)
        try:
            entries = []
            for item in rnd.sample(range(PAGES), rnd.randint(1, 12)):
                key = self.kind, slot, item
                entries.append((key, self.log.begun.get(key, 0) + 1))
            self.log.begin(*entries)
            for (_, _, item), version in entries:
                if os.pwrite(fd, page(slot, item, version), item * PAGE) != PAGE:
                    raise Wrong("a short write")
            os.fsync(fd)
        finally:
            os.close(fd)
        self.log.ack(*entries)

    def check(self, slot, after_start):
        data = read_file(self.path(slot)) if os.path.exists(self.path(slot)) else b""
        settled = []
        for item in range(PAGES):
            key = self.kind, slot, item
            got = data[item * PAGE:(item + 1) * PAGE]
            low, high = self.log.at(key), self.log.begun.get(key, 0)
            if not got and high == 0:
                continue
            version = struct.unpack("<Q", got[-8:])[0] if len(got) == PAGE else -1
            ok = low <= version <= (high if after_start else low)
            if not ok or got != page(slot, item, version):
                raise Wrong(f"page {item} of {self.path(slot)} is version {version} "
                            f"({'intact' if version >= 0 and got == page(slot, item, version) else 'damaged'}), flushed was {low}, begun {high}")
            if low != high:
                settled.append((key, version))
        if settled:  # from now on it is what it is
            fd = self.open(slot)
            os.fsync(fd)
            os.close(fd)
            self.log.begin(*settled)
            self.log.ack(*settled)

    def verify(self, slot):
        self.check(slot, False)

    def settle(self, slot):
        self.check(slot, True)


class Wholes:
    """Files replaced by a rename over them."""
    kind = "whole"

    def __init__(self, log):
        self.log = log

    def path(self, slot):
        return f"{DATA}/whole{slot}"

    def step(self, slot, rnd):
        key = self.kind, slot, 0
        version = self.log.begun.get(key, 0) + 1
        self.log.begin((key, version))
        write_file(self.path(slot) + ".tmp", content(self.kind, slot, version))
        os.rename(self.path(slot) + ".tmp", self.path(slot))
        fsync_dir(DATA)
        self.log.ack((key, version))

    def verify(self, slot):
        version = self.log.at((self.kind, slot, 0))
        if version:
            expect(self.path(slot), content(self.kind, slot, version), f"version {version}")

    def settle(self, slot):
        key = self.kind, slot, 0
        if not self.log.in_flight(key):
            return self.verify(slot)
        version = self.log.begun[key]
        old = self.log.at(key)
        if not os.path.exists(self.path(slot)):
            if old:
                raise Wrong(f"{self.path(slot)} is lost, flushed was version {old}")
        elif read_file(self.path(slot)) != content(self.kind, slot, version):
            expect(self.path(slot), content(self.kind, slot, old), f"version {old} or {version}")
        self.step(slot, None)


class Lives:
    """Files that come and go: they exist in odd versions."""
    kind = "life"

    def __init__(self, log):
        self.log = log

    def path(self, slot):
        return f"{DATA}/life{slot}"

    def step(self, slot, rnd):
        key = self.kind, slot, 0
        version = self.log.begun.get(key, 0) + 1
        self.log.begin((key, version))
        if version % 2:
            write_file(self.path(slot), content(self.kind, slot, version))
        else:
            os.unlink(self.path(slot))
        fsync_dir(DATA)
        self.log.ack((key, version))

    def verify(self, slot):
        version = self.log.at((self.kind, slot, 0))
        if version % 2:
            expect(self.path(slot), content(self.kind, slot, version), f"version {version}")
        else:
            expect_gone(self.path(slot))

    def settle(self, slot):
        key = self.kind, slot, 0
        if not self.log.in_flight(key):
            return self.verify(slot)
        # Half made or half removed: make an end of it.
        if os.path.lexists(self.path(slot)):
            os.unlink(self.path(slot))
        fsync_dir(DATA)
        version = self.log.begun[key] + self.log.begun[key] % 2
        self.log.begin((key, version))
        self.log.ack((key, version))


class Trees:
    """Directories with files, which are made, renamed and removed: version 1 modulo 3
    has name a, 2 has name b, 0 is none."""
    kind = "tree"

    def __init__(self, log):
        self.log = log

    def path(self, slot, name):
        return f"{DATA}/tree{slot}{name}"

    def step(self, slot, rnd):
        key = self.kind, slot, 0
        version = self.log.begun.get(key, 0) + 1
        self.log.begin((key, version))
        a, b = self.path(slot, "a"), self.path(slot, "b")
        if version % 3 == 1:
            os.makedirs(a + "/deep/er")
            for i, sub in enumerate(["", "/deep", "/deep/er"]):
                write_file(f"{a}{sub}/file{i}", content(self.kind, slot * 10 + i, version))
                fsync_dir(a + sub)
            os.link(a + "/file0", a + "/deep/link")
            fsync_dir(a + "/deep")
        elif version % 3 == 2:
            os.rename(a, b)
        else:
            remove_tree(b)
        fsync_dir(DATA)
        self.log.ack((key, version))

    def verify(self, slot):
        version = self.log.at((self.kind, slot, 0))
        state = version % 3
        for name, present in ("a", state == 1), ("b", state == 2):
            path = self.path(slot, name)
            if not present:
                expect_gone(path)
                continue
            made = version - state + 1
            for i, sub in enumerate(["", "/deep", "/deep/er"]):
                expect(f"{path}{sub}/file{i}", content(self.kind, slot * 10 + i, made), f"version {made}")
            if os.stat(path + "/deep/link").st_ino != os.stat(path + "/file0").st_ino:
                raise Wrong(f"{path}/deep/link is no link of file0")

    def settle(self, slot):
        key = self.kind, slot, 0
        if not self.log.in_flight(key):
            return self.verify(slot)
        for name in "ab":
            if os.path.lexists(self.path(slot, name)):
                remove_tree(self.path(slot, name))
        fsync_dir(DATA)
        version = (self.log.begun[key] + 2) // 3 * 3
        self.log.begin((key, version))
        self.log.ack((key, version))


class Grown:
    """Files that grow by chunks, in blocks that were never written, and give way to the
    next when they are large: version n is n chunks, GENERATION to a file."""
    kind = "grown"
    CHUNK = 96 << 10
    GENERATION = 100

    def __init__(self, log):
        self.log = log

    def path(self, slot, version):
        return f"{DATA}/grown{slot}.{version // self.GENERATION}"

    def chunk(self, slot, n):
        return hashlib.shake_128(f"grown {slot} {n}".encode()).digest(self.CHUNK)

    def step(self, slot, rnd):
        key = self.kind, slot, 0
        old = self.log.at(key)
        first = old - old % self.GENERATION
        version = min(old + rnd.randint(1, 6), first + self.GENERATION)
        self.log.begin((key, version))
        fd = os.open(self.path(slot, old), os.O_CREAT | os.O_WRONLY, 0o644)
        try:
            for n in range(old, version):
                data = self.chunk(slot, n)
                if os.pwrite(fd, data, (n - first) * self.CHUNK) != len(data):
                    raise Wrong("a short write")
            os.fsync(fd)
        finally:
            os.close(fd)
        fsync_dir(DATA)
        if version == first + self.GENERATION:
            os.unlink(self.path(slot, old))
            fsync_dir(DATA)
        self.log.ack((key, version))

    def check(self, slot, version, chunks):
        """Compares the given of the file's chunks; others may follow them."""
        first = version - version % self.GENERATION
        if version == first:
            return
        fd = os.open(self.path(slot, version), os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            for n in chunks(first, version):
                if os.pread(fd, self.CHUNK, (n - first) * self.CHUNK) != self.chunk(slot, n):
                    raise Wrong(f"chunk {n - first} of {self.path(slot, version)} is damaged; flushed are {version - first}")
        finally:
            os.close(fd)

    def verify(self, slot):
        version = self.log.at((self.kind, slot, 0))
        self.check(slot, version, lambda first, end: random.sample(range(first, end), min(4, end - first)))

    def settle(self, slot):
        key = self.kind, slot, 0
        version = self.log.at(key)
        first = version - version % self.GENERATION
        in_flight = self.log.in_flight(key)
        last = in_flight and self.log.begun[key] == first + self.GENERATION  # it may be gone already
        if last and not os.path.exists(self.path(slot, version)):
            version = self.log.begun[key]
        else:
            self.check(slot, version, range)
            if in_flight and os.path.exists(self.path(slot, version)):
                os.truncate(self.path(slot, version), (version - first) * self.CHUNK)
        self.log.begin((key, version))
        self.log.ack((key, version))


class Image:
    """Files that came with the image: changed, moved away, removed and made again.
    Version 0 modulo 4 is the file, 1 the file with a line more, 2 that moved, 3 none."""
    kind = "image"

    def __init__(self, log, sums):
        self.log = log
        self.files = sorted(p for p in sums if p.startswith(ALTERED))[:LIMITS["image"]]
        self.sums = sums
        if len(self.files) < 8:
            raise Wrong(f"only {len(self.files)} files below {ALTERED}")
        LIMITS[self.kind] = len(self.files)

    def line(self, version):
        return f"version {version}\n".encode()

    def step(self, slot, rnd):
        key = self.kind, slot, 0
        path = self.files[slot]
        version = self.log.begun.get(key, 0) + 1
        self.log.begin((key, version))
        if version % 4 == 1:
            fd = os.open(path, os.O_APPEND | os.O_WRONLY)
            os.write(fd, self.line(version))
            os.fsync(fd)
            os.close(fd)
        elif version % 4 == 2:
            os.rename(path, path + ".moved")
        elif version % 4 == 3:
            os.unlink(path + ".moved")
        else:
            write_file(path, content(self.kind, slot, version))
        fsync_dir(os.path.dirname(path))
        self.log.ack((key, version))

    def verify(self, slot):
        version = self.log.at((self.kind, slot, 0))
        path = self.files[slot]
        state = version % 4
        for name, present in (path, state < 2), (path + ".moved", state == 2):
            if not present:
                expect_gone(name)
                continue
            made = version - state
            got = read_file(name)
            tail = self.line(made + 1) if state else b""
            body = got[:len(got) - len(tail)]
            if got[len(body):] != tail:
                raise Wrong(f"{name} ends with {got[-40:]!r}, want {tail!r}")
            if made == 0:
                if hashlib.sha256(body).hexdigest() != self.sums[path]:
                    raise Wrong(f"{name} is not the image's, with {len(got)} bytes")
            elif body != content(self.kind, slot, made):
                raise Wrong(f"{name} is not version {made}")

    def settle(self, slot):
        key = self.kind, slot, 0
        if not self.log.in_flight(key):
            return self.verify(slot)
        path = self.files[slot]
        for name in path, path + ".moved":
            if os.path.lexists(name):
                os.unlink(name)
        fsync_dir(os.path.dirname(path))
        version = self.log.begun[key] // 4 * 4 + 3
        self.log.begin((key, version))
        self.log.ack((key, version))


def reader(sums, rnd):
    """Reads every file of the image, over and over, in another order each time."""
    paths = sorted(p for p in sums if not p.startswith(ALTERED))
    while True:
        rnd.shuffle(paths)
        for path in paths:
            begin = time.monotonic()
            got = hashlib.sha256(read_file(path)).hexdigest()
            if got != sums[path]:
                raise Wrong(f"{path} has sum {got}, want {sums[path]}")
            counts["read"] += 1
            # One CPU is not all for one container.
            time.sleep(min(2 * (time.monotonic() - begin), 0.02))


def writer(kinds, rnd):
    while True:
        what = rnd.choice(kinds)
        what.step(rnd.randrange(LIMITS[what.kind]), rnd)
        what = rnd.choice(kinds)
        what.verify(rnd.randrange(LIMITS[what.kind]))
        time.sleep(0.02)


def guarded(f, *args):
    def run():
        try:
            f(*args)
        except BaseException:
            fail(f.__name__)
    threading.Thread(target=run, daemon=True).start()


def main():
    seed = os.environ["SEED"]
    os.makedirs(DATA, exist_ok=True)
    fsync_dir(os.path.dirname(DATA))
    sums = {}
    with open(SUMS, encoding="utf-8", errors="surrogateescape") as f:
        for line in f:
            sums[line[66:].rstrip("\n")] = line[:64]
    if len(sums) < 500:
        raise Wrong(f"only {len(sums)} sums")
    log = Log()
    for name in os.listdir(DATA):
        if name.endswith(".tmp"):
            os.unlink(f"{DATA}/{name}")
    kinds = [Pages(log), Wholes(log), Lives(log), Trees(log), Grown(log), Image(log, sums)]
    flushed = len(log.acked)
    for kind in kinds:
        for slot in range(LIMITS[kind.kind]):
            kind.settle(slot)
    with open(OUT + "/ready", "w", encoding="ascii") as f:
        f.write(f"{flushed} flushed things are in place\n")
    guarded(reader, sums, random.Random(seed + "r" + str(flushed)))
    guarded(writer, kinds, random.Random(seed + "w" + str(flushed)))
    beat = os.open(OUT + "/beat", os.O_CREAT | os.O_WRONLY, 0o600)
    while True:
        os.pwrite(beat, f"{counts['read']:12d} {counts['flushed']:12d}\n".encode(), 0)
        time.sleep(0.02)


try:
    main()
except BaseException:
    fail("main")
