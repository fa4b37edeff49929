package kernel

import (
	"errors"
	"io/fs"
	"slices"
	"strconv"
	"strings"
)

// Device is what sysfs shows of one device.
type Device struct {
	Index uint32
	// Connected says that it has a server, or waits for another one.
	Connected bool
	// Backend is what the one who connected it gave, with the line end cut off.
	Backend   string
	SizeBytes int64
	ReadOnly  bool
}

// Path is the device's node in /dev.
func Path(index uint32) string { return "/dev/nbd" + strconv.FormatUint(uint64(index), 10) }

// Devices looks at all devices in sys, which is /sys, without opening any, in order of
// index.
func Devices(sys fs.FS) ([]Device, error) {
	entries, err := fs.ReadDir(sys, "block")
	if err != nil {
		return nil, err
	}
	var list []Device
	for _, e := range entries {
		if index, ok := parseIndex(e.Name()); ok {
			if d, err := Look(sys, index); err == nil {
				list = append(list, d)
			}
		}
	}
	slices.SortFunc(list, func(a, b Device) int { return int(int64(a.Index) - int64(b.Index)) })
	return list, nil
}

// Look looks at one device in sys, which is /sys. It is fs.ErrNotExist when there is none.
func Look(sys fs.FS, index uint32) (Device, error) {
	dir := "block/nbd" + strconv.FormatUint(uint64(index), 10) + "/"
	sectors, err := attribute(sys, dir+"size")
	if err != nil {
		return Device{}, err
	}
	d := Device{Index: index}
	n, err := strconv.ParseInt(sectors, 10, 64)
	if err != nil || n < 0 || n > 1<<54 {
		return Device{}, fs.ErrNotExist
	}
	d.SizeBytes = n * 512 // sysfs counts sectors of 512 bytes whatever the block size
	ro, _ := attribute(sys, dir+"ro")
	d.ReadOnly = ro == "1"
	// pid and backend exist while it is connected.
	if _, err := attribute(sys, dir+"pid"); err == nil {
		d.Connected = true
	} else if !errors.Is(err, fs.ErrNotExist) {
		return Device{}, err
	}
	d.Backend, _ = attribute(sys, dir+"backend")
	return d, nil
}

func parseIndex(name string) (uint32, bool) {
	digits, ok := strings.CutPrefix(name, "nbd")
	if !ok || digits == "" || digits[0] == '+' {
		return 0, false
	}
	n, err := strconv.ParseUint(digits, 10, 20) // minors have 20 bits
	return uint32(n), err == nil
}

func attribute(sys fs.FS, name string) (string, error) {
	raw, err := fs.ReadFile(sys, name)
	if err != nil {
		return "", err
	}
	return strings.TrimRight(string(raw[:min(len(raw), 4096)]), "\n"), nil
}
