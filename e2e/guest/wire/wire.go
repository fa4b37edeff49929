// Package wire is what the driver of a guest and the agent inside it say to each
// other: a stream of frames in both directions over one byte channel, so that several
// commands run at a time.
//
// Both ends are built from the same source, so the form has no versions. The package
// must not know what carries the bytes.
package wire

import (
	"encoding/gob"
	"io"
	"sync"
)

// Kind says what a frame means.
type Kind uint8

// The kinds of frames. Hello, Output and Exit come from the agent.
const (
	Hello  Kind = iota + 1 // the agent is ready
	Input                  // more of the standard input of a command that is not started yet
	Start                  // run Args with the input that came before
	Signal                 // send signal Code to the command's process group
	Output                 // more of the command's output, both streams in the order written
	Exit                   // the command ended: Code is its exit status, 128 + the signal's number when a signal ended it, or Text says why it could not start
)

// ChunkBytes is how much Data a frame carries at most, so that commands take turns.
const ChunkBytes = 32 << 10

// Frame is one message.
type Frame struct {
	ID   uint32 // of the command, chosen by the driver
	Kind Kind
	Data []byte
	Args []string
	Code int
	Text string
}

// Conn carries frames. Send is safe for concurrent use; Receive is for one goroutine.
type Conn struct {
	mu  sync.Mutex
	enc *gob.Encoder // guarded by mu
	dec *gob.Decoder
}

// New returns a Conn over c.
func New(c io.ReadWriter) *Conn { return &Conn{enc: gob.NewEncoder(c), dec: gob.NewDecoder(c)} }

// Send writes one frame.
func (c *Conn) Send(f Frame) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.enc.Encode(f)
}

// Receive waits for the next frame.
func (c *Conn) Receive() (Frame, error) {
	var f Frame
	err := c.dec.Decode(&f)
	return f, err
}
