// Package nvmesys is what Linux tells of NVMe in sysfs and by events, whatever the
// transport. It must not know presentations.
package nvmesys

import (
	"io/fs"
	"strings"
)

// IsDrive tells whether a block device is a whole nvmeNamespace: nvme0n1, but neither a
// partition nvme0n1p1 nor one path of several, nvme0c1n1.
func IsDrive(name string) bool {
	rest, ok := strings.CutPrefix(name, "nvme")
	if !ok {
		return false
	}
	subsystem, number, ok := strings.Cut(rest, "n")
	return ok && Digits(subsystem) && Digits(number)
}

// Digits tells whether s is a number as the kernel writes those of devices.
func Digits(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == ""
}

// List is fs.ReadDir for which a folder that does not exist is empty: a kernel that
// has not loaded nvme has none.
func List(sys fs.FS, name string) ([]fs.DirEntry, error) {
	entries, err := fs.ReadDir(sys, name)
	if err != nil {
		if _, serr := fs.Stat(sys, name); serr != nil {
			return nil, nil
		}
		return nil, err
	}
	return entries, nil
}

// Attribute reads an attribute, which is at most a page; "" when there is none.
func Attribute(sys fs.FS, name string) string {
	raw, err := fs.ReadFile(sys, name)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(raw[:min(len(raw), 4096)]))
}
