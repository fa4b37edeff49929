package rpc

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"syscall"

	"github.com/thaw-project/thaw/kind"
)

// The codes of JSON-RPC 2.0 (section 5.1). SPDK answers them with the texts below, and
// beside them negative errno values with the texts of strerror.
const (
	CodeParse          = -32700
	CodeInvalidRequest = -32600
	CodeMethodNotFound = -32601
	CodeInvalidParams  = -32602
	CodeInternal       = -32603
)

// Error is what a client is told. Cause is for the log: SPDK's messages are fixed texts
// that tools compare, so the reason does not go over the wire.
type Error struct {
	Code    int    `json:"code"`
	Message string `json:"message"`
	Cause   error  `json:"-"`
}

func (e *Error) Error() string {
	if e.Cause != nil {
		return fmt.Sprintf("%s (%d): %v", e.Message, e.Code, e.Cause)
	}
	return fmt.Sprintf("%s (%d)", e.Message, e.Code)
}

func (e *Error) Unwrap() error { return e.Cause }

// Errno is the answer -n with the text of strerror(n).
func Errno(n syscall.Errno, cause error) *Error {
	return &Error{Code: -int(n), Message: Strerror(n), Cause: cause}
}

// InvalidParams is -32602 with SPDK's text.
func InvalidParams(cause error) *Error {
	return &Error{Code: CodeInvalidParams, Message: "Invalid parameters", Cause: cause}
}

// Internal is -32603; an empty message is SPDK's "Internal error".
func Internal(message string, cause error) *Error {
	if message == "" {
		message = "Internal error"
	}
	return &Error{Code: CodeInternal, Message: message, Cause: cause}
}

// asError makes an Error of whatever a method returned.
func asError(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return Internal("", err)
}

// failureLevel is how loud a failure is: a client that looks for what is not there does
// nothing wrong.
func failureLevel(method string, e *Error) slog.Level {
	if strings.Contains(method, "_get_") && errors.Is(e, kind.NotFound) {
		return slog.LevelDebug
	}
	return slog.LevelWarn
}

// strerror has the texts of glibc for what the methods answer: Go's differ in case, and
// tools compare them.
var strerror = map[syscall.Errno]string{
	syscall.EPERM:      "Operation not permitted",
	syscall.ENOENT:     "No such file or directory",
	syscall.EIO:        "Input/output error",
	syscall.ENXIO:      "No such device or address",
	syscall.EAGAIN:     "Resource temporarily unavailable",
	syscall.ENOMEM:     "Cannot allocate memory",
	syscall.EACCES:     "Permission denied",
	syscall.EBUSY:      "Device or resource busy",
	syscall.EEXIST:     "File exists",
	syscall.ENODEV:     "No such device",
	syscall.EINVAL:     "Invalid argument",
	syscall.EFBIG:      "File too large",
	syscall.ENOSPC:     "No space left on device",
	syscall.EROFS:      "Read-only file system",
	syscall.EILSEQ:     "Invalid or incomplete multibyte or wide character",
	syscall.EOPNOTSUPP: "Operation not supported",
	syscall.ETIMEDOUT:  "Connection timed out",
	syscall.EALREADY:   "Operation already in progress",
	syscall.ECANCELED:  "Operation canceled",
	syscall.ENOKEY:     "Required key not available",
}

// Strerror is glibc's text for n.
func Strerror(n syscall.Errno) string {
	if s, ok := strerror[n]; ok {
		return s
	}
	return fmt.Sprintf("Unknown error %d", int(n))
}
