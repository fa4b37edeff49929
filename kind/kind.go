// Package kind is the short, fixed set of error kinds that Thaw's parts agree on.
//
// A part wraps what went wrong with what it was doing to what, and marks it with
// one kind; each front-end (FUSE, gRPC, the command line) maps kinds once to its
// own codes. Package kind knows no front-end but errno, which every storage
// front-end shares.
package kind

import (
	"errors"
	"fmt"
	"io/fs"
	"syscall"
)

// Kind classifies an error. Test with errors.Is(err, kind.NotFound).
type Kind string

// Error makes a Kind usable as the target of errors.Is.
func (k Kind) Error() string { return string(k) }

// The kinds. Add one only when some caller must act differently on it.
const (
	Invalid     Kind = "invalid argument"   // the request can never succeed as it is
	NotFound    Kind = "not found"          //
	Exists      Kind = "already exists"     //
	InUse       Kind = "in use"             // would succeed once somebody lets go
	ReadOnly    Kind = "read-only"          //
	NoSpace     Kind = "no space left"      // free some, then retry
	Corrupt     Kind = "corrupt"            // a checksum or an invariant does not hold
	Unsupported Kind = "unsupported"        // newer format, or absent from this kernel or build
	Denied      Kind = "permission denied"  //
	Unavailable Kind = "unavailable"        // a peer is down or not started; a retry may succeed
	Canceled    Kind = "canceled"           //
	IO          Kind = "input/output error" // the device below failed
)

type marked struct {
	kind Kind
	err  error
}

func (m *marked) Error() string        { return m.err.Error() }
func (m *marked) Unwrap() error        { return m.err }
func (m *marked) Is(target error) bool { k, ok := target.(Kind); return ok && k == m.kind }

// Errorf formats an error as fmt.Errorf does and marks it with k. The outermost
// mark is the one Of reports.
func Errorf(k Kind, format string, args ...any) error {
	return &marked{kind: k, err: fmt.Errorf(format, args...)}
}

// Wrap marks err with k; nil stays nil.
func Wrap(k Kind, err error) error {
	if err == nil {
		return nil
	}
	return &marked{kind: k, err: err}
}

// Of returns the kind of err, or "" when it has none. Well-known system errors
// have a kind without being marked.
func Of(err error) Kind {
	var m *marked
	if errors.As(err, &m) {
		return m.kind
	}
	var k Kind
	if errors.As(err, &k) {
		return k
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		for _, e := range errnos {
			if e.errno == errno {
				return e.kind
			}
		}
		return IO
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return NotFound
	case errors.Is(err, fs.ErrExist):
		return Exists
	case errors.Is(err, fs.ErrPermission):
		return Denied
	}
	return ""
}

// The first row of a kind is the errno it maps to; further rows only map back.
var errnos = []struct {
	kind  Kind
	errno syscall.Errno
}{
	{Invalid, syscall.EINVAL},
	{NotFound, syscall.ENOENT},
	{Exists, syscall.EEXIST},
	{InUse, syscall.EBUSY},
	{ReadOnly, syscall.EROFS},
	{NoSpace, syscall.ENOSPC},
	{NoSpace, syscall.EDQUOT},
	{IO, syscall.EIO}, // before Corrupt: an EIO from the system is the device's
	{Corrupt, syscall.EIO},
	{Unsupported, syscall.EOPNOTSUPP},
	{Unsupported, syscall.ENOSYS},
	{Denied, syscall.EACCES},
	{Denied, syscall.EPERM},
	{Unavailable, syscall.EAGAIN},
	{Unavailable, syscall.ECONNREFUSED},
	{Canceled, syscall.ECANCELED},
}

// Errno maps err for front-ends that answer with errno. Errors without a kind are
// EIO; nil is 0.
func Errno(err error) syscall.Errno {
	if err == nil {
		return 0
	}
	k := Of(err)
	for _, e := range errnos {
		if e.kind == k {
			return e.errno
		}
	}
	return syscall.EIO
}
