package dpusim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/thaw-project/thaw/kind"
)

const (
	// qmpPatience bounds one connection, which serves one operation: QEMU answers in
	// milliseconds unless another client has the monitor.
	qmpPatience = 15 * time.Second
	// maxQMPBytes bounds what one connection brings: the longest answer, the list of block
	// nodes, has some KiB for each.
	maxQMPBytes = 16 << 20
	// maxEvents bounds the events between two answers that are kept.
	maxEvents = 1024
)

// monitor is a connection to QEMU's QMP (docs/interop/qmp-spec). One goroutine uses it.
type monitor struct {
	conn   net.Conn
	dec    *json.Decoder
	ids    uint64
	events []event // since the last call of take
	done   func() bool
	waited time.Duration // for QEMU to answer, since dial
}

type event struct {
	Name string `json:"event"`
	Data struct {
		Device string `json:"device"`
	} `json:"data"`
}

// qmpError is what QEMU refuses a command with.
type qmpError struct {
	Command string
	Class   string `json:"class"`
	Desc    string `json:"desc"`
}

func (e *qmpError) Error() string {
	return fmt.Sprintf("QEMU refuses %s: %s (%s)", e.Command, e.Desc, e.Class)
}

// dial connects; the connection ends with ctx, or when it has lived qmpPatience.
func dial(ctx context.Context, path string) (*monitor, error) {
	deadline := time.Now().Add(qmpPatience)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	d := net.Dialer{Deadline: deadline}
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, kind.Wrap(kind.Unavailable, fmt.Errorf("QEMU's monitor: %w", err))
	}
	m := &monitor{conn: conn, dec: json.NewDecoder(io.LimitReader(conn, maxQMPBytes))}
	m.done = context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	err = conn.SetDeadline(deadline)
	var hello struct{ QMP json.RawMessage }
	if err == nil {
		began := time.Now()
		err = m.dec.Decode(&hello)
		m.waited += time.Since(began)
	}
	if err == nil && hello.QMP == nil {
		err = errors.New("it does not greet as a QMP server does")
	}
	if err == nil {
		err = m.do("qmp_capabilities", nil, nil)
	}
	if err != nil {
		m.close()
		if errors.Is(err, os.ErrDeadlineExceeded) && ctx.Err() == nil {
			err = fmt.Errorf("%w: does another client keep it?", err)
		}
		return nil, kind.Wrap(kind.Unavailable, fmt.Errorf("QEMU's monitor %s: %w", path, err))
	}
	return m, nil
}

func (m *monitor) close() {
	m.done()
	m.conn.Close()
}

// do executes a command and stores what it returns in what result points to, unless that
// is nil. Errors are *qmpError, or kind.Unavailable.
func (m *monitor) do(command string, arguments, result any) error {
	m.ids++
	request, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, arguments, m.ids})
	if err != nil {
		return err
	}
	began := time.Now()
	defer func() { m.waited += time.Since(began) }()
	if _, err := m.conn.Write(append(request, '\n')); err != nil {
		return kind.Wrap(kind.Unavailable, fmt.Errorf("QEMU's monitor: send %s: %w", command, err))
	}
	for {
		var answer struct {
			event
			Return json.RawMessage `json:"return"`
			Error  *qmpError       `json:"error"`
			ID     uint64          `json:"id"`
		}
		if err := m.dec.Decode(&answer); err != nil {
			return kind.Wrap(kind.Unavailable, fmt.Errorf("QEMU's monitor: answer to %s: %w", command, err))
		}
		switch {
		case answer.Name != "":
			m.keep(answer.event)
		case answer.Error != nil:
			answer.Error.Command = command
			return answer.Error
		case answer.ID != m.ids:
			return kind.Errorf(kind.Unavailable, "QEMU's monitor: answer %d to request %d, %s", answer.ID, m.ids, command)
		case result == nil:
			return nil
		default:
			if err := json.Unmarshal(answer.Return, result); err != nil {
				return kind.Wrap(kind.Corrupt, fmt.Errorf("QEMU's answer to %s: %w", command, err))
			}
			return nil
		}
	}
}

func (m *monitor) keep(e event) {
	if len(m.events) < maxEvents {
		m.events = append(m.events, e)
	}
}

// deleted waits at most wait for the event that a device is gone; false says nothing.
func (m *monitor) deleted(id string, wait time.Duration) bool {
	m.conn.SetDeadline(time.Now().Add(wait)) // the connection serves nothing after this
	for {
		for _, e := range m.events {
			if e.Name == "DEVICE_DELETED" && e.Data.Device == id {
				return true
			}
		}
		m.events = m.events[:0]
		var e event
		if m.dec.Decode(&e) != nil {
			return false
		}
		m.keep(e)
	}
}
