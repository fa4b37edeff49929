package lvol

import (
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// ballast is a preallocated file beside meta.db. When the file system under the pool
// is full it is given up, so that a delete or a flush, which free space, can still
// write the little they need. While it is missing nothing new is allocated, so the
// pool's own writers do not eat what was given up for that.
type ballast struct {
	path string
	size int64

	mu      sync.Mutex
	missing bool // guarded by mu
}

func newBallast(dir string, size int64) *ballast {
	return &ballast{path: filepath.Join(dir, "ballast"), size: max(size, 0), missing: size > 0}
}

// release gives the space up and tells whether there was any.
func (b *ballast) release() bool {
	if b.size == 0 {
		return false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	st, err := os.Stat(b.path)
	b.missing = true
	if err != nil || os.Remove(b.path) != nil {
		return false
	}
	return st.Size() > 0
}

// refill preallocates the ballast if it is missing and tells whether it is there.
func (b *ballast) refill() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.missing {
		return true
	}
	f, err := os.OpenFile(b.path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return false
	}
	defer f.Close()
	switch err := unix.Fallocate(int(f.Fd()), 0, 0, b.size); err {
	case nil, unix.EOPNOTSUPP, unix.ENOSYS: // no ballast on such a file system
		b.missing = false
		return true
	default:
		f.Truncate(0)
		return false
	}
}
