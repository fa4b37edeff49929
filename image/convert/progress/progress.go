// Package progress shows a conversion to a person: one bar per layer on a terminal,
// one line per finished layer elsewhere.
package progress

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/term"

	"github.com/thaw-project/thaw/image/convert"
)

const (
	redrawEvery = 100 * time.Millisecond
	barWidth    = 20
)

// Display draws events of convert.Options.Progress. Its methods may be called
// concurrently.
type Display struct {
	out  io.Writer
	size func() (columns, rows int) // nil when out is no terminal

	stop chan struct{}
	done sync.WaitGroup

	mu     sync.Mutex
	layers []convert.Event // guarded by mu: in the order they were first seen
	drawn  int             // guarded by mu: lines on the screen that are ours
	dirty  bool            // guarded by mu
}

// New returns a display on out. A terminal is redrawn by a goroutine until Close.
func New(out *os.File) *Display {
	fd := int(out.Fd())
	if !term.IsTerminal(fd) || os.Getenv("TERM") == "dumb" {
		return newDisplay(out, nil)
	}
	return newDisplay(out, func() (int, int) {
		columns, rows, err := term.GetSize(fd)
		if err != nil || columns <= 0 || rows <= 0 { // a terminal that does not know
			return 80, 24
		}
		return columns, rows
	})
}

func newDisplay(out io.Writer, size func() (int, int)) *Display {
	d := &Display{out: out, size: size, stop: make(chan struct{})}
	if size != nil {
		d.done.Go(func() {
			tick := time.NewTicker(redrawEvery)
			defer tick.Stop()
			for {
				select {
				case <-tick.C:
					d.redraw()
				case <-d.stop:
					d.redraw()
					return
				}
			}
		})
	}
	return d
}

// Close draws what is left to draw, once.
func (d *Display) Close() {
	close(d.stop)
	d.done.Wait()
}

// Event takes a change. It is a convert.Options.Progress.
func (d *Display) Event(e convert.Event) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var before convert.State
	n := 0
	for ; n < len(d.layers); n++ {
		if d.layers[n].Platform == e.Platform && d.layers[n].Index == e.Index {
			before = d.layers[n].State
			break
		}
	}
	if n == len(d.layers) {
		d.layers = append(d.layers, convert.Event{})
	}
	d.layers[n] = e
	d.dirty = true
	if d.size == nil && e.State != before && (e.State == convert.StateWritten || e.State == convert.StateReused) {
		fmt.Fprintf(d.out, "%s layer %d/%d %s %s\n", e.Platform, e.Index+1, e.Count, short(e.Digest), describe(e))
	}
}

func (d *Display) redraw() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.dirty {
		return
	}
	d.dirty = false
	columns, rows := d.size()
	var b bytes.Buffer
	if d.drawn > 0 {
		fmt.Fprintf(&b, "\x1b[%dA", d.drawn) // up to our first line
	}
	b.WriteString("\x1b[J") // and away with all below
	lines := d.lines(columns, max(rows-1, 1))
	for _, l := range lines {
		b.WriteString(l)
		b.WriteByte('\n')
	}
	d.drawn = len(lines)
	d.out.Write(b.Bytes())
}

// lines are at most rows lines of at most columns characters. What is finished gives
// way to what is not.
func (d *Display) lines(columns, rows int) []string {
	show := d.layers
	hidden := 0
	if len(show) > rows {
		var open []convert.Event
		for _, e := range show {
			if !finished(e) {
				open = append(open, e)
			}
		}
		if len(open) > rows-1 {
			open = open[:max(rows-1, 0)]
		}
		hidden = len(show) - len(open)
		show = open
	}
	var out []string
	if hidden > 0 {
		out = append(out, clip(fmt.Sprintf("%d more layers", hidden), columns))
	}
	for _, e := range show {
		out = append(out, clip(line(e), columns))
	}
	return out
}

func finished(e convert.Event) bool {
	return e.Pushed && (e.State == convert.StateWritten || e.State == convert.StateReused)
}

func line(e convert.Event) string {
	part := 0.0
	switch {
	case e.State == convert.StateWritten, e.State == convert.StateReused:
		part = 1
	case e.SizeBytes > 0:
		part = float64(e.FetchedBytes) / float64(e.SizeBytes)
	}
	full := min(int(part*barWidth), barWidth)
	bar := strings.Repeat("=", full) + strings.Repeat(" ", barWidth-full)
	return fmt.Sprintf("%3d/%d %s [%s] %s", e.Index+1, e.Count, short(e.Digest), bar, describe(e))
}

func describe(e convert.Event) string {
	var s string
	switch e.State {
	case convert.StateWaiting:
		if s = "waiting"; e.FetchedBytes > 0 {
			s = "fetched " + size(e.FetchedBytes) + " of " + size(e.SizeBytes)
		}
	case convert.StateApplying:
		s = "fetched " + size(e.FetchedBytes) + " of " + size(e.SizeBytes) + ", applied " + size(e.AppliedBytes)
	case convert.StateWritten:
		s = "written, " + size(e.AppliedBytes)
	case convert.StateReused:
		s = "shared"
	default:
		s = string(e.State)
	}
	if finished(e) {
		s += ", pushed"
	}
	return s
}

func size(n int64) string {
	for _, u := range []struct {
		bytes int64
		name  string
	}{{1 << 30, "GiB"}, {1 << 20, "MiB"}, {1 << 10, "KiB"}} {
		if n >= u.bytes {
			return fmt.Sprintf("%.1f %s", float64(n)/float64(u.bytes), u.name)
		}
	}
	return fmt.Sprintf("%d B", n)
}

func short(digest string) string {
	_, hex, _ := strings.Cut(digest, ":")
	return hex[:min(len(hex), 12)]
}

func clip(s string, columns int) string {
	if columns > 0 && len(s) > columns {
		return s[:columns]
	}
	return s
}
