package torture

import (
	"archive/tar"
	"encoding/binary"
	"fmt"
	"strings"
	"time"
)

// Capability is a security.capability value (version 2: cap_net_raw+ep).
const Capability = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// ACL builds a POSIX ACL: owner, one user, owning group, mask, others.
func ACL(owner, user, group, mask, other uint16, uid uint32) string {
	b := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range []struct {
		tag, perm uint16
		id        uint32
	}{{1, owner, ^uint32(0)}, {2, user, uid}, {4, group, ^uint32(0)}, {16, mask, ^uint32(0)}, {32, other, ^uint32(0)}} {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.perm)
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return string(b)
}

// sizes are file sizes around every border a file system might have.
var sizes = []int{0, 1, 511, 512, 513, 1023, 1024, 1025, 2048, 3000, 4000, 4095, 4096, 4097, 8191, 8192, 65535, 65536, 65537, 200_000, 1 << 20, 3<<20 + 17}

// Stack returns a stack of layers with all cases that containerd can unpack, the
// lowest first.
func Stack() []Layer {
	return []Layer{
		{"base", base()},
		{"changes", changes()},
		{"empty", NewBuilder().Tar()},
		{"back again", backAgain()},
		{"metadata only", metadataOnly()},
		{"implied parents", impliedParents()},
		{"large directory", largeDirectory()},
		{"thinned directory", thinnedDirectory()},
		{"links", links()},
		{"last", last()},
	}
}

func base() []byte {
	b := NewBuilder()
	b.Global("comment", "ignored")
	b.Dir(".", Mode(0o700), Owner(7, 7))
	b.Dir("sizes")
	for i, n := range sizes {
		b.File(fmt.Sprintf("sizes/%d", n), Data(int64(i), n))
	}

	// Names.
	b.Dir("names")
	for _, name := range []string{
		"!bang", "-dash", ".dot", "..b", "...", "a b", "new\nline", "back\\slash", "tab\t", "\x01", "\x7f",
		"äöü-ßẞ-日本語", "invalid-\xff\xfe\x80", strings.Repeat("n", 255), strings.Repeat("é", 127), "%s%n", "wh.not", "..wh.x", ",",
	} {
		b.File("names/"+name, []byte(name))
	}
	deep := "deep"
	for i := range 60 {
		b.Dir(deep)
		b.File(deep+"/f", []byte{byte(i)})
		deep += fmt.Sprintf("/level-%02d-%s", i, strings.Repeat("x", 10+i%20))
	}
	b.File("./dot-slash", []byte("x")).File("dot//double/./slash", []byte("y")).Dir("dot", Mode(0o711)).Dir("dot/double")

	// Attributes.
	b.Dir("attributes")
	for i, mode := range []int64{0, 0o1, 0o400, 0o4755, 0o2755, 0o1777, 0o6711, 0o7777} {
		b.File(fmt.Sprintf("attributes/mode-%o", mode), Data(int64(i), 100), Mode(mode))
		b.Dir(fmt.Sprintf("attributes/dir-%o", mode), Mode(mode))
	}
	for _, id := range []int{1, 65534, 65535, 65536, 1 << 20, 1<<31 - 1, 1 << 31, 1<<32 - 2} {
		b.File(fmt.Sprintf("attributes/uid-%d", id), []byte("x"), Owner(id, id-1), Mode(0o4755))
	}
	for _, t := range []time.Time{
		time.Unix(0, 0), time.Unix(0, 1), time.Unix(1, 999_999_999), time.Unix(-1, 0), time.Unix(-1_000_000, 5),
		time.Unix(1<<31-1, 0), time.Unix(1<<31, 7), time.Unix(1<<32+1, 1), time.Unix(9_000_000_000, 0), time.Unix(16_000_000_000, 0),
	} {
		b.File(fmt.Sprintf("attributes/time-%d-%d", t.Unix(), t.Nanosecond()), []byte("t"), MTime(t))
		b.Symlink(fmt.Sprintf("attributes/link-time-%d-%d", t.Unix(), t.Nanosecond()), "nowhere", MTime(t))
		b.Dir(fmt.Sprintf("attributes/dir-time-%d-%d", t.Unix(), t.Nanosecond()), MTime(t))
	}
	b.File("attributes/capable", Data(3, 5000), Mode(0o755), Xattr("security.capability", Capability))
	b.File("attributes/small-capable", []byte("#!"), Mode(0o4755), Owner(1000, 1000), Xattr("security.capability", Capability))
	b.File("attributes/xattrs", []byte("x"), Xattr("user.a", "1"), Xattr("user.empty", ""), Xattr("user.binary", "\x00\x01\xff"),
		Xattr("user."+strings.Repeat("n", 200), "long name"), Xattr("security.selinux", "system_u:object_r:bin_t:s0\x00"))
	b.File("attributes/large-xattr", Data(4, 1000), Xattr("user.large", string(Data(5, 3000))))
	b.File("attributes/larger-xattr", nil, Xattr("user.large", strings.Repeat("y", 3900)))
	b.Dir("attributes/dir-xattrs", Xattr("user.dir", "d"), Xattr("security.x", "y"))
	b.File("attributes/ignored", []byte("i"), Xattr("trusted.overlay.opaque", "y"), Xattr("trusted.x", "y"), Xattr("os2.unknown", "z"))
	b.Dir("attributes/not-opaque", Xattr("trusted.overlay.opaque", "y"))
	b.Symlink("attributes/ignored-link", "x", Xattr("user.on-a-link", "no"), Xattr("security.on-a-link", "yes"))
	b.Device("attributes/ignored-fifo", tar.TypeFifo, 0, 0, Xattr("user.on-a-fifo", "no"))
	b.File("attributes/acl", []byte("a"), Mode(0o750), Xattr("system.posix_acl_access", ACL(7, 5, 5, 5, 0, 1000)))
	b.File("attributes/acl-chmod", []byte("a"), Mode(0o604), Xattr("system.posix_acl_access", ACL(7, 7, 7, 7, 7, 1001)))
	b.Dir("attributes/acl-default", Mode(0o2775), Owner(5, 55), Xattr("system.posix_acl_default", ACL(7, 7, 5, 7, 0, 1002)), Xattr("system.posix_acl_access", ACL(7, 6, 5, 7, 1, 1002)))
	b.File("attributes/acl-default/inherits", []byte("x"), Mode(0o640))
	b.Dir("attributes/acl-default/dir-inherits", Mode(0o750))
	b.Symlink("attributes/acl-default/link", "x")
	b.Device("attributes/acl-default/fifo", tar.TypeFifo, 0, 0)
	b.File("attributes/acl-default/implied/file", []byte("x"))

	// Types.
	b.Dir("types", Mode(0o2775), Owner(3, 33))
	b.Device("types/null", tar.TypeChar, 1, 3, Mode(0o666))
	b.Device("types/sda", tar.TypeBlock, 8, 0, Owner(0, 6))
	b.Device("types/big", tar.TypeChar, 4095, 1<<20-1)
	b.Device("types/big-block", tar.TypeBlock, 259, 70000)
	b.Device("types/minor", tar.TypeChar, 0, 5)
	b.Device("types/fifo", tar.TypeFifo, 0, 0, Mode(0o620))
	b.Symlink("types/short", "a").Symlink("types/absolute", "/etc/passwd").Symlink("types/up", "../../../../etc")
	b.Symlink("types/long", strings.Repeat("l/", 1500)).Symlink("types/longest", strings.Repeat("m", 4095))
	b.Symlink("types/loop", "loop").Symlink("types/odd", "äö\xff\n")
	b.Dir("types/empty")
	b.File("types/implied-in-setgid/f", []byte("x"))

	// Zeros and holes.
	b.Dir("holes")
	b.File("holes/zeros", make([]byte, 1<<20))
	b.File("holes/zeros-odd", make([]byte, 1<<20+333))
	b.File("holes/zero-byte", []byte{0})
	b.File("holes/zero-page", make([]byte, 4096))
	mixed := Data(9, 1<<20+5)
	clear(mixed[100_000:900_000])
	b.File("holes/middle", mixed)
	front := make([]byte, 300_000)
	front[299_999] = 1
	b.File("holes/front", front)
	back := make([]byte, 300_000)
	back[0] = 1
	b.File("holes/back", back)
	b.SparsePAX("holes/sparse", 3<<20, []Extent{{0, Data(1, 512)}, {1 << 20, Data(2, 10_000)}, {3<<20 - 100, Data(3, 100)}})
	b.SparsePAX("holes/sparse-end", 20<<20+1, []Extent{{5000, Data(4, 5000)}, {20<<20 + 1, nil}})
	b.SparsePAX("holes/sparse-empty", 80<<20, []Extent{{80 << 20, nil}})
	b.SparsePAX("holes/sparse-small", 100, []Extent{{50, []byte("x")}})

	// Hard links.
	b.Dir("links")
	b.File("links/a", Data(11, 10_000), Mode(0o600)).Link("links/b", "links/a", Mode(0o640), Owner(9, 9)).Link("links/c", "/links/a", Mode(0o4711), Owner(10, 10))
	b.Symlink("links/s", "a").Link("links/s2", "links/s", Owner(4, 4))
	b.Device("links/n", tar.TypeChar, 1, 5).Link("links/n2", "links/n", Mode(0o666))
	b.Device("links/p", tar.TypeFifo, 0, 0).Link("links/p2", "links/p", Mode(0o600))
	b.File("links/cap", []byte("c"), Xattr("security.capability", Capability)).Link("links/cap2", "links/cap")
	b.File("links/cap3", []byte("d")).Link("links/cap4", "links/cap3", Xattr("security.capability", Capability), Xattr("user.l", "1"))
	b.File("links/small", []byte("small")).Link("links/small2", "links/small").Link("deep/small3", "links/small2")

	// Twice.
	b.Dir("twice")
	b.File("twice/file", []byte("first"), Xattr("user.first", "1")).File("twice/file", []byte("second"), Mode(0o600))
	b.Dir("twice/dir", Mode(0o700), Xattr("user.first", "1")).File("twice/dir/f", []byte("f")).Dir("twice/dir", Mode(0o755), Xattr("user.second", "2"))
	b.Dir("twice/dir-then-file").File("twice/dir-then-file/gone", []byte("x")).Symlink("twice/dir-then-link", "file")
	b.File("twice/link", []byte("x")).Symlink("twice/link", "file")
	b.File("twice/to-dir", []byte("x")).Dir("twice/to-dir").File("twice/to-dir/f", []byte("y"))

	// Below links: containerd follows them inside the root.
	b.Dir("usr").Dir("usr/lib").Dir("usr/bin")
	b.Symlink("lib", "usr/lib").Symlink("bin", "/usr/bin").Symlink("out", "../../../usr/lib").Symlink("chain", "bin").Symlink("dangling", "usr/new/dir")
	b.File("lib/in-lib", []byte("1")).File("bin/in-bin", []byte("2")).File("out/from-out", []byte("3")).File("chain/from-chain", []byte("4"))
	b.File("dangling/x", []byte("5")).Link("lib/linked", "bin/in-bin").Dir("lib/sub").File("lib/sub/f", []byte("6"))
	b.Dir("w").Dir("w/z").Symlink("y", "w").Symlink("x", "y/z").File("x/e/f", []byte("7")).Symlink("w/back", "../x/e").File("y/back/g", []byte("8"))
	b.Dir("usr/lib", MTime(time.Unix(1_500_000_000, 1))).Dir("usr/bin")

	// Whiteouts with nothing below, and AUFS's own.
	b.Whiteout("nothing").Opaque("types/empty").File(".wh..wh.plnk", []byte("aufs")).File(".wh..wh.aufs", nil)

	// For the layers above.
	b.Dir("gone").File("gone/f", []byte("x")).Dir("gone/d").File("gone/d/f", []byte("x"))
	b.Dir("partly").File("partly/stays", []byte("s")).File("partly/goes", []byte("g")).Dir("partly/dir").File("partly/dir/f", []byte("f"))
	for _, name := range []string{"opaque-before", "opaque-after", "opaque-between", "opaque-bare"} {
		b.Dir(name, Xattr("user.base", "1")).File(name+"/old", []byte("old")).Dir(name+"/sub").File(name+"/sub/old", []byte("old")).File(name+"/both", []byte("old"))
	}
	b.Dir("dir-to-file").File("dir-to-file/f", []byte("x")).Dir("dir-to-link").File("dir-to-link/f", []byte("x"))
	b.File("file-to-dir", []byte("x")).File("file-to-link", []byte("x")).Symlink("link-to-dir", "usr").Symlink("link-to-file", "usr/lib")
	b.File("file-to-device", []byte("x")).Dir("dir-to-fifo").File("replaced", Data(20, 9000), Xattr("user.old", "1"), Xattr("security.capability", Capability))
	b.Dir("same-layer").File("same-layer/f", []byte("old")).Dir("same-layer/d").File("same-layer/d/old", []byte("old"))
	b.Dir("implied", Mode(0o2750), Owner(12, 13), Xattr("user.implied", "kept"), Xattr("security.implied", "too")).Dir("implied/deep", Mode(0o700), Owner(14, 15))
	b.File("implied/deep/f", []byte("x"))
	return b.Tar()
}

func changes() []byte {
	b := NewBuilder()
	b.Whiteout("gone").Dir("partly", Mode(0o770)).Whiteout("partly/goes").Whiteout("partly/dir").Whiteout("partly/never-was")
	b.Dir("opaque-before").Opaque("opaque-before").File("opaque-before/new", []byte("new")).File("opaque-before/both", []byte("new")).Dir("opaque-before/sub")
	b.Dir("opaque-after").File("opaque-after/new", []byte("new")).File("opaque-after/both", []byte("new")).Dir("opaque-after/sub").File("opaque-after/sub/new", []byte("new")).Opaque("opaque-after")
	b.Dir("opaque-between").File("opaque-between/a", []byte("new")).Opaque("opaque-between").File("opaque-between/z", []byte("new")).Opaque("opaque-between")
	b.Opaque("opaque-bare")
	b.File("dir-to-file", []byte("now a file")).Symlink("dir-to-link", "usr").Dir("file-to-dir").File("file-to-dir/f", []byte("f")).Symlink("file-to-link", "partly")
	b.Dir("link-to-dir").File("link-to-dir/f", []byte("f")).File("link-to-file", []byte("f"))
	b.Device("file-to-device", tar.TypeChar, 1, 7).Device("dir-to-fifo", tar.TypeFifo, 0, 0)
	b.File("replaced", []byte("shorter"), Mode(0o600))
	b.Whiteout("same-layer/f").File("same-layer/f", []byte("new")).Whiteout("same-layer/d").Dir("same-layer/d").File("same-layer/d/new", []byte("new")).Dir("same-layer")
	b.Whiteout("links/b").Whiteout("types/null").Whiteout("types/short").Whiteout("holes/sparse-empty").Dir("holes").Dir("links").Dir("types")
	b.File("sizes/4096", Data(77, 4097)).File("sizes/0", []byte("no longer")).File("sizes/200000", nil).Dir("sizes")
	b.File("new/dir/with/parents", []byte("x"))
	return b.Tar()
}

func backAgain() []byte {
	b := NewBuilder()
	b.Dir("dir-to-file", Mode(0o750)).File("dir-to-file/f2", []byte("2"))
	b.Dir("dir-to-link").File("dir-to-link/f2", []byte("2"))
	b.File("file-to-dir", []byte("a file again")).File("file-to-link", []byte("again")).Symlink("link-to-dir", "usr/lib").Symlink("link-to-file", "bin")
	b.Dir("gone", Mode(0o700)).File("gone/new", []byte("new"))
	b.File("file-to-device", []byte("again")).Dir("dir-to-fifo").File("dir-to-fifo/f", []byte("f"))
	b.File("partly/goes", []byte("back")).Dir("partly").File("opaque-before/old", []byte("back")).Dir("opaque-before")
	// usr/lib is a directory below and lib a link to it: an entry under lib here
	// makes lib a directory, as the layer has no link of that name.
	b.File("lib/new-layer", []byte("x"))
	return b.Tar()
}

func metadataOnly() []byte {
	b := NewBuilder()
	b.Dir("sizes", Mode(0o1777), Owner(100, 100), MTime(time.Unix(1_700_000_000, 999)), Xattr("user.only", "this"))
	b.Dir("attributes/dir-xattrs", Mode(0o711))
	b.Dir("attributes")
	b.Dir("deep", Owner(1<<31+7, 2))
	return b.Tar()
}

func impliedParents() []byte {
	b := NewBuilder()
	b.File("implied/deep/new", []byte("x")).File("implied/other/new", []byte("x")).File("attributes/dir-7777/f", []byte("x"))
	b.File("types/empty/in", []byte("x")).Whiteout("deep/f")
	return b.Tar()
}

func largeDirectory() []byte {
	b := NewBuilder()
	b.Dir("large")
	for i := range 3000 {
		// Names of all lengths, so that blocks of entries fill in every way.
		b.File(fmt.Sprintf("large/%04d-%s", i, strings.Repeat("p", i*7%240)), []byte(fmt.Sprint(i)))
	}
	b.Dir("exact")
	for i := range 15 {
		b.File(fmt.Sprintf("exact/%02d%s", i, strings.Repeat("e", 248)), nil)
	}
	for i := range 300 {
		b.Dir(fmt.Sprintf("large/dir-%d", i)).Symlink(fmt.Sprintf("large/dir-%d/l", i), strings.Repeat("t", i*13%4000+1))
	}
	return b.Tar()
}

func thinnedDirectory() []byte {
	b := NewBuilder()
	b.Dir("large")
	for i := 0; i < 3000; i += 2 {
		b.Whiteout(fmt.Sprintf("large/%04d-%s", i, strings.Repeat("p", i*7%240)))
	}
	for i := 0; i < 300; i += 3 {
		b.Whiteout(fmt.Sprintf("large/dir-%d", i))
	}
	return b.Tar()
}

func links() []byte {
	b := NewBuilder()
	b.Dir("links2").File("links2/a", Data(31, 5000)).Link("links2/b", "links2/a")
	b.File("links/a", Data(32, 6000)) // one of the names of the file below
	b.Dir("links")
	b.Symlink("links2/to", "../links2").Link("links2/c", "links2/to/a")
	return b.Tar()
}

func last() []byte {
	b := NewBuilder()
	b.Whiteout("links2/a").Dir("links2").Whiteout("opaque-after").Whiteout("lib")
	b.Dir("links")
	b.File("last", []byte("last"))
	return b.Tar()
}
