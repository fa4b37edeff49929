package torture

import (
	"archive/tar"
	"math"
	"strings"

	"github.com/thaw-project/thaw/kind"
)

// BadLayer is a layer that must be refused.
type BadLayer struct {
	Name string
	Tar  []byte
	Kind kind.Kind
	// Entry is a part of the entry's name that the error must show; "" when no
	// entry can be named.
	Entry string
}

// Bad returns layers that must be refused whatever is below them. A file may have
// at most 1 TiB for those that claim too much.
func Bad() []BadLayer {
	one := func(h tar.Header, attrs ...Attr) []byte {
		return NewBuilder().Dir("fine").File("fine/f", []byte("x")).Add(h, nil, attrs...).Tar()
	}
	file := func(name string, attrs ...Attr) []byte {
		return one(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, attrs...)
	}
	link := func(name, target string) []byte {
		return one(tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target})
	}
	// Each file has a PAX header and its records, for the nanoseconds.
	const secondHeader = 3*512 + 5120
	whole := NewBuilder().File("first", Data(1, 5000)).File("second", Data(2, 5000)).Tar()
	damaged := append([]byte(nil), whole...)
	damaged[secondHeader+20] ^= 0xff

	huge := func(size uint64) []byte {
		h := rawHeader("huge", '0', 0, 0)
		clear(h[124:136])
		h[124] = 0x80
		for i := range 8 {
			h[128+i] = byte(size >> (56 - 8*i))
		}
		seal(h)
		return NewBuilder().File("fine", nil).Raw(h).Raw(Data(1, 512)).Tar()
	}
	var many strings.Builder
	for i := range 200 {
		many.WriteString(record("SCHILY.xattr.user.x"+strings.Repeat("i", i), "v"))
	}
	manyXattrs := NewBuilder().Raw(rawHeader("x", 'x', int64(many.Len()), 0)).Raw(pad([]byte(many.String()))).Raw(rawHeader("many", '0', 0, 0)).Tar()

	return []BadLayer{
		{"absolute name", file("/etc/passwd"), kind.Invalid, "/etc/passwd"},
		{"absolute root", one(tar.Header{Typeflag: tar.TypeDir, Name: "/"}), kind.Invalid, "/"},
		{"dot dot first", file("../outside"), kind.Invalid, "../outside"},
		{"dot dot inside", file("a/../../outside"), kind.Invalid, "a/../../outside"},
		{"dot dot last", one(tar.Header{Typeflag: tar.TypeDir, Name: "a/.."}), kind.Invalid, "a/.."},
		{"whiteout of dot dot", file("a/.wh..."), kind.Invalid, "a/.wh..."},
		{"whiteout of dot", file("a/.wh.."), kind.Invalid, "a/.wh.."},
		{"whiteout of nothing", file("a/.wh."), kind.Invalid, "a/.wh."},
		{"hard link out", link("l", "../../etc/passwd"), kind.Invalid, "l"},
		{"hard link out, absolute", link("l", "/../etc/passwd"), kind.Invalid, "l"},
		{"hard link to nothing", link("l", "not-there"), kind.Invalid, "l"},
		{"hard link to a directory", link("l", "fine"), kind.Invalid, "l"},
		{"hard link to the root", link("l", "/"), kind.Invalid, "l"},
		{"hard link to itself", link("l", "l"), kind.Invalid, "l"},
		{"below a file", file("fine/f/below"), kind.Invalid, "fine/f/below"},
		{"long element", file(strings.Repeat("x", 256)), kind.Invalid, "xxx"},
		{"long path", file(strings.Repeat("x/", 2048) + "y"), kind.Invalid, "x/x"},
		{"root is a file", one(tar.Header{Typeflag: tar.TypeReg, Name: "."}), kind.Invalid, "."},
		{"empty link target", NewBuilder().Raw(rawHeader("sl", '2', 0, 0)).Tar(), kind.Invalid, "sl"},
		{"long link target", one(tar.Header{Typeflag: tar.TypeSymlink, Name: "sl", Linkname: strings.Repeat("x", 4096)}), kind.Invalid, "sl"},
		{"links in a circle", NewBuilder().Symlink("c1", "c2").Symlink("c2", "c1").File("c1/f", nil).Tar(), kind.Invalid, "c1/f"},
		{"large uid", file("u", Owner(math.MaxUint32, 0)), kind.Invalid, "u"},
		{"negative gid", file("g", Owner(0, -1)), kind.Invalid, "g"},
		{"large device", one(tar.Header{Typeflag: tar.TypeChar, Name: "d", Devmajor: 4096}), kind.Invalid, "d"},
		{"unknown type", NewBuilder().Raw(rawHeader("t", 'D', 0, 0)).Tar(), kind.Invalid, "t"},
		{"large attribute", file("x", Xattr("user.x", strings.Repeat("v", 1<<16))), kind.Invalid, "x"},
		{"long attribute name", file("x", Xattr("user."+strings.Repeat("n", 251), "v")), kind.Invalid, "x"},
		{"many attributes", manyXattrs, kind.Invalid, "many"},
		{"bad ACL", file("x", Xattr("system.posix_acl_access", "\x02\x00\x00\x00\x01")), kind.Invalid, "x"},
		{"8 EiB less one", huge(math.MaxInt64), kind.Invalid, "huge"},
		{"8 EiB", huge(1 << 63), kind.Corrupt, "fine"},
		{"2 TiB", huge(2 << 40), kind.Invalid, "huge"},
		{"sparse 2 TiB", NewBuilder().SparsePAX("huge", 2<<40, []Extent{{0, []byte("x")}}).Tar(), kind.Invalid, "huge"},
		{"cut in a file", whole[:3000], kind.Corrupt, "first"},
		{"cut in a header", whole[:secondHeader+100], kind.Corrupt, "first"},
		{"no tar", Data(1, 10_000), kind.Corrupt, ""},
		{"damaged header", damaged, kind.Corrupt, "first"},
		{"PAX header that never ends", NewBuilder().Raw(rawHeader("x", 'x', 1<<40, 0)).Tar(), kind.Corrupt, ""},
	}
}
