package rpc

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net"
	"time"
	"unicode/utf8"
)

const (
	// MaxRequestBytes bounds a request, or a batch of them. SPDK's is 32 KiB; ours
	// leaves room for batches and stays small against MaxConns of them.
	MaxRequestBytes = 256 << 10

	// maxDepth bounds how deep a request is nested; SPDK's parser has the same.
	maxDepth = 64
)

// errSyntax is for input after which the stream cannot be followed.
var errSyntax = errors.New("not a JSON value that is accepted here")

// frames reads JSON values off a connection.
type frames struct {
	nc       net.Conn
	patience time.Duration
	began    func(bool) // told when a request begins to arrive

	d     *json.Decoder
	start int64 // where in the stream the value at hand may begin
	read  int64
	late  time.Time // when the value must be complete; zero while none has begun
}

func newFrames(nc net.Conn, patience time.Duration, began func(bool)) *frames {
	f := &frames{nc: nc, patience: patience, began: began}
	f.d = json.NewDecoder(f)
	return f
}

// Read is what the decoder reads from. It ends a value that is too long or too slow.
func (f *frames) Read(p []byte) (int, error) {
	room := f.start + MaxRequestBytes - f.read
	if room <= 0 {
		return 0, errSyntax
	}
	if err := f.nc.SetReadDeadline(f.late); err != nil {
		return 0, err
	}
	n, err := f.nc.Read(p[:min(int64(len(p)), room)])
	f.read += int64(n)
	if f.late.IsZero() && !blank(p[:n]) {
		f.late = time.Now().Add(f.patience)
		f.began(true)
	}
	return n, err
}

func blank(p []byte) bool { return len(bytes.TrimLeft(p, " \t\r\n")) == 0 }

// next returns the next value. io.EOF is the end between values; errSyntax is for what
// must be answered with a parse error; all else ends the connection silently.
func (f *frames) next() (json.RawMessage, error) {
	f.start, f.late = f.d.InputOffset(), time.Time{}
	f.began(false)
	if rest, _ := io.ReadAll(f.d.Buffered()); !blank(rest) {
		f.late = time.Now().Add(f.patience)
		f.began(true)
	}
	var raw json.RawMessage
	err := f.d.Decode(&raw)
	var syntax *json.SyntaxError
	switch {
	case errors.As(err, &syntax), errors.Is(err, errSyntax):
		return nil, errSyntax
	case err != nil:
		return nil, err
	case !utf8.Valid(raw) || depth(raw) > maxDepth:
		return nil, errSyntax
	}
	return raw, nil
}

// depth is how deep arrays and objects nest in a valid value.
func depth(raw []byte) (deepest int) {
	level, quoted := 0, false
	for i := 0; i < len(raw); i++ {
		switch c := raw[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case quoted:
		case c == '{' || c == '[':
			level++
			deepest = max(deepest, level)
		case c == '}' || c == ']':
			level--
		}
	}
	return deepest
}
