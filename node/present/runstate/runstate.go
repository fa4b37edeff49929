// Package runstate keeps what a presenter must know after the death of its process and
// must forget at a reboot: a JSON file that is replaced whole, and the lock that lets
// one process at a time act on it.
//
// It must not know what the states hold.
package runstate

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/thaw-project/thaw/filelock"
	"github.com/thaw-project/thaw/kind"
)

// MaxIDBytes bounds the id of a disk.
const MaxIDBytes = 128

// maxFileBytes bounds a state file that is read: some ten thousand disks.
const maxFileBytes = 64 << 20

// CheckID tells with kind.Invalid why id cannot be the id of a disk.
func CheckID(id string) error {
	ok := id != "" && len(id) <= MaxIDBytes && id != "." && id != ".."
	for i := 0; ok && i < len(id); i++ {
		switch c := id[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '.', c == '_', c == '-':
		default:
			ok = false
		}
	}
	if !ok {
		return kind.Errorf(kind.Invalid, "bad disk id %.140q: letters, digits, '.', '_' and '-', at most %d bytes", id, MaxIDBytes)
	}
	return nil
}

// envelope is what is in a file.
type envelope struct {
	Version int             `json:"version"`
	BootID  string          `json:"boot_id"` // a state of another boot means nothing
	State   json.RawMessage `json:"state"`
}

// BootID names this boot of the machine.
func BootID() (string, error) {
	raw, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(raw)), err
}

// Load reads the state at path into state. It returns false when there is none of this
// boot, kind.Unsupported when it is of a version newer than this one, and kind.Corrupt
// when it cannot be read.
func Load(path string, version int, state any) (found bool, err error) {
	raw, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	var e envelope
	if len(raw) > maxFileBytes {
		return false, kind.Errorf(kind.Corrupt, "%s: %d bytes are too many", path, len(raw))
	}
	if err := json.Unmarshal(raw, &e); err != nil {
		return false, kind.Errorf(kind.Corrupt, "%s: %w", path, err)
	}
	if e.Version > version {
		return false, kind.Errorf(kind.Unsupported, "%s has version %d, newer than this program's %d", path, e.Version, version)
	}
	boot, err := BootID()
	if err != nil {
		return false, err
	}
	if e.BootID != boot {
		return false, nil
	}
	d := json.NewDecoder(bytes.NewReader(e.State))
	if err := d.Decode(state); err != nil {
		return false, kind.Errorf(kind.Corrupt, "%s: %w", path, err)
	}
	return true, nil
}

// Save replaces the state at path. A process killed at any moment leaves the old or
// the new one; a power loss ends the boot that it is about.
func Save(path string, version int, state any) error {
	boot, err := BootID()
	if err != nil {
		return fmt.Errorf("save state: %w", err)
	}
	inner, err := json.Marshal(state)
	if err != nil {
		return fmt.Errorf("save state: %w", err)
	}
	raw, err := json.Marshal(envelope{version, boot, inner})
	if err != nil {
		return fmt.Errorf("save state: %w", err)
	}
	tmp := path + ".tmp"
	if err := os.WriteFile(tmp, raw, 0o600); err != nil {
		return fmt.Errorf("save state: %w", err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("save state: %w", err)
	}
	return nil
}

// Lock takes the lock that belongs to the state at path, in a file with ".lock"
// appended, whose directory is made. It is kind.InUse when another process still has it
// after wait.
func Lock(path string, wait time.Duration) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path+".lock", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := filelock.Exclusive(f, wait); err != nil {
		f.Close()
		if errors.Is(err, kind.InUse) {
			return nil, kind.Errorf(kind.InUse, "%s: another process serves these disks", path)
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return f, nil
}
