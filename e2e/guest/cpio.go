package guest

import (
	"bytes"
	"fmt"
)

// cpio makes an archive in the form "newc" that the kernel unpacks as its first root
// (Documentation/driver-api/early-userspace/buffer-format.rst).
type cpio struct {
	b     bytes.Buffer
	inode int
}

func (c *cpio) dir(name string) { c.entry(name, 0o040755, 0, 0, nil) }

func (c *cpio) file(name string, mode int, content []byte) {
	c.entry(name, 0o100000|mode, 0, 0, content)
}

func (c *cpio) device(name string, major, minor int) { c.entry(name, 0o020600, major, minor, nil) }

// entry writes a header of 13 fields of 8 hexadecimal digits, the name and the content,
// each padded to 4 bytes.
func (c *cpio) entry(name string, mode, major, minor int, content []byte) {
	c.inode++
	c.b.WriteString("070701")
	for _, v := range []int{
		c.inode, mode, 0, 0, // owner and group
		1, 0, // links, time
		len(content), 0, 0, // device of the file
		major, minor, len(name) + 1, 0, // checksum, not in this form
	} {
		fmt.Fprintf(&c.b, "%08X", v)
	}
	c.b.WriteString(name)
	c.b.WriteByte(0)
	c.pad()
	c.b.Write(content)
	c.pad()
}

func (c *cpio) pad() {
	for c.b.Len()%4 != 0 {
		c.b.WriteByte(0)
	}
}

// end returns the archive. Another may follow it.
func (c *cpio) end() []byte {
	c.entry("TRAILER!!!", 0, 0, 0, nil)
	return c.b.Bytes()
}
