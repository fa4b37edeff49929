package presenttest

import (
	"os"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/target/bdev"
)

// OpenFile is a present.Opener of the file at source.Path, as simple as can be: what is
// written is in the page cache, and so survives SIGKILL.
func OpenFile(source present.Source, readOnly bool) (bdev.Device, error) {
	mode := os.O_RDWR
	if readOnly {
		mode = os.O_RDONLY
	}
	f, err := os.OpenFile(source.Path, mode, 0)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	return &fileDevice{f, st.Size(), readOnly}, nil
}

type fileDevice struct {
	f         *os.File
	sizeBytes int64
	readOnly  bool
}

func (d *fileDevice) ReadAt(p []byte, off int64) (int, error) { return d.f.ReadAt(p, off) }

func (d *fileDevice) WriteAt(p []byte, off int64) (int, error) {
	if d.readOnly {
		return 0, kind.Errorf(kind.ReadOnly, "write")
	}
	return d.f.WriteAt(p, off)
}

func (d *fileDevice) Flush() error { return unix.Fdatasync(int(d.f.Fd())) }

func (d *fileDevice) Discard(off, n int64) error {
	if d.readOnly {
		return kind.Errorf(kind.ReadOnly, "discard")
	}
	return unix.Fallocate(int(d.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func (d *fileDevice) WriteZeroes(off, n int64) error { return d.Discard(off, n) }
func (d *fileDevice) SizeBytes() int64               { return d.sizeBytes }
func (d *fileDevice) ReadOnly() bool                 { return d.readOnly }
func (d *fileDevice) Close() error                   { return d.f.Close() }

// user is a presented disk as its user has it open. It makes system calls that the
// runtime knows may wait: a disk whose server was killed keeps its users waiting, and
// those must not stop the test that starts the next server.
type user struct {
	fd   int
	path string
}

func openDisk(path string, flags int) (*user, error) {
	for {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, &os.PathError{Op: "open", Path: path, Err: err}
		}
		return &user{fd, path}, nil
	}
}

func (d *user) ReadAt(p []byte, off int64) (int, error) { return d.all(unix.Pread, p, off) }

func (d *user) WriteAt(p []byte, off int64) (int, error) { return d.all(unix.Pwrite, p, off) }

func (d *user) all(call func(int, []byte, int64) (int, error), p []byte, off int64) (done int, err error) {
	for done < len(p) {
		n, err := call(d.fd, p[done:], off+int64(done))
		switch {
		case err == unix.EINTR:
		case err != nil:
			return done, err
		case n == 0:
			return done, unix.ENODATA
		default:
			done += n
		}
	}
	return done, nil
}

func (d *user) sync() error {
	for {
		if err := unix.Fsync(d.fd); err != unix.EINTR {
			return err
		}
	}
}

// uncache makes the next reads come from below.
func (d *user) uncache() { unix.Fadvise(d.fd, 0, 0, unix.FADV_DONTNEED) }

func (d *user) close() { unix.Close(d.fd) }
