package spdk

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"syscall"

	"github.com/thaw-project/thaw/kind"
)

// The codes of JSON-RPC 2.0 (section 5.1). SPDK answers them, and beside them negative
// errno values.
const (
	CodeParse          = -32700
	CodeInvalidRequest = -32600
	CodeMethodNotFound = -32601
	CodeInvalidParams  = -32602
	CodeInternal       = -32603
)

// Error is an answer that is an error. Its reason is in the target's log: SPDK's messages
// are fixed texts.
type Error struct {
	Code    int    // as above, or a negative errno
	Message string // for people; no two versions need have the same
	Method  string // what was called
}

func (e *Error) Error() string {
	hint := "the target's log says why"
	if e.Code == CodeMethodNotFound {
		hint = "see 'thaw target call rpc_get_methods'"
	}
	return fmt.Sprintf("%s: %s (%d): %s", e.Method, printable(e.Message), e.Code, hint)
}

// printable is what a target sent, fit for a message: SPDK's own texts as they are.
func printable(s string) string {
	s = s[:min(len(s), 500)]
	if strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' }) {
		return strconv.QuoteToASCII(s)
	}
	return s
}

// Unwrap gives an error the kind that its code surely means, so that errors.Is(err,
// kind.NotFound) and kind.Of work. Not every code has one: -1 is "duplicate" of one
// method and "claimed" of another, and the methods of nvmf answer every failure with
// -32602 or -32603.
func (e *Error) Unwrap() error {
	if k := e.kind(); k != "" {
		return k
	}
	return nil
}

func (e *Error) kind() kind.Kind {
	switch e.Code {
	case CodeMethodNotFound:
		return kind.Unsupported
	case -int(syscall.ENODEV), -int(syscall.ENOENT):
		return kind.NotFound
	case -int(syscall.EEXIST):
		return kind.Exists
	case -int(syscall.EBUSY):
		return kind.InUse
	case -int(syscall.EINVAL):
		return kind.Invalid
	case -int(syscall.EROFS):
		return kind.ReadOnly
	case -int(syscall.EACCES):
		return kind.Denied
	case -int(syscall.ENOSPC), -int(syscall.ENOMEM):
		return kind.NoSpace
	case -int(syscall.EOPNOTSUPP):
		return kind.Unsupported
	case -int(syscall.EAGAIN), -int(syscall.ETIMEDOUT):
		return kind.Unavailable
	case -int(syscall.ECANCELED):
		return kind.Canceled
	case -int(syscall.EIO):
		return kind.IO
	}
	return ""
}

// unanswered marks the error of a call that was sent, at least in part, and not answered.
type unanswered struct{ err error }

func (u *unanswered) Error() string { return u.err.Error() }
func (u *unanswered) Unwrap() error { return u.err }

// Unanswered tells whether err is of a call that was sent and not answered: what it asked
// for may have been done, may be done later, or never.
func Unanswered(err error) bool {
	var u *unanswered
	return errors.As(err, &u)
}
