//go:build failpoint

package failpoint

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

type action int

const (
	kill action = iota
	stop
	delay
)

// point says what to do when a step is reached.
type point struct {
	do    action
	pause time.Duration // of delay
	nth   int           // from 1; 0: each time
}

// set is what one text says, and how often its points were reached.
type set struct {
	points  map[string][]point
	reached map[string]int
}

// process is the state of this process.
type process struct {
	mu    sync.Mutex
	fixed set // guarded by mu: of the environment

	path string        // of the file; "" for none
	file set           // guarded by mu
	id   unix.Timespec // guarded by mu: of the file that file was read from
	ino  uint64        // guarded by mu: 0 when there was none

	trace *os.File // nil for none
}

var here = mustStart(os.Getenv)

func mustStart(getenv func(string) string) *process {
	p, err := start(getenv)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	return p
}

func start(getenv func(string) string) (*process, error) {
	p := &process{path: getenv("THAW_FAILPOINT_FILE")}
	var err error
	if p.fixed, err = parse(getenv("THAW_FAILPOINTS")); err != nil {
		return nil, fmt.Errorf("THAW_FAILPOINTS: %w", err)
	}
	if path := getenv("THAW_FAILPOINT_TRACE"); path != "" {
		if p.trace, err = os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600); err != nil {
			return nil, fmt.Errorf("THAW_FAILPOINT_TRACE: %w", err)
		}
	}
	return p, nil
}

// Enabled tells whether steps are looked at: for who would have to make up their names.
const Enabled = true

// Reach says that a step was reached.
func Reach(name string) { here.reach(name) }

func (p *process) reach(name string) {
	if p.trace != nil {
		if _, err := p.trace.WriteString(name + "\n"); err != nil {
			fmt.Fprintln(os.Stderr, "THAW_FAILPOINT_TRACE:", err)
		}
	}
	var pause time.Duration
	p.mu.Lock()
	p.readFile()
	for _, s := range []*set{&p.fixed, &p.file} {
		points := s.points[name]
		if len(points) == 0 {
			continue
		}
		s.reached[name]++
		for _, x := range points {
			if x.nth != 0 && x.nth != s.reached[name] {
				continue
			}
			switch x.do {
			case delay:
				pause += x.pause
			case kill, stop:
				if p.path != "" {
					os.Remove(p.path)
				}
				signal := unix.SIGKILL
				if x.do == stop {
					signal = unix.SIGSTOP
				}
				// With the lock held: no other step is reached after this one.
				if err := unix.Kill(os.Getpid(), signal); err != nil {
					fmt.Fprintln(os.Stderr, "failpoint: kill:", err)
					os.Exit(2)
				}
				if x.do == kill {
					select {} // the signal may come a moment later
				}
			}
		}
	}
	p.mu.Unlock()
	time.Sleep(pause)
}

// readFile takes over what the file says now, if it is another file than before. The
// caller holds p.mu.
func (p *process) readFile() {
	if p.path == "" {
		return
	}
	var st unix.Stat_t
	if unix.Stat(p.path, &st) != nil {
		p.file, p.ino = set{}, 0
		return
	}
	if st.Ino == p.ino && st.Ctim == p.id {
		return
	}
	raw, err := os.ReadFile(p.path)
	if err == nil {
		p.file, err = parse(strings.TrimSpace(string(raw)))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "THAW_FAILPOINT_FILE:", err)
		os.Remove(p.path)
		p.file, p.ino = set{}, 0
		return
	}
	p.ino, p.id = st.Ino, st.Ctim
}

func parse(text string) (set, error) {
	s := set{points: make(map[string][]point), reached: make(map[string]int)}
	if text == "" {
		return s, nil
	}
	for entry := range strings.SplitSeq(text, ";") {
		name, what, found := strings.Cut(entry, "=")
		name = strings.TrimSpace(name)
		x, err := parsePoint(strings.TrimSpace(what))
		if !found || name == "" || err != nil {
			return set{}, fmt.Errorf("%q: must be name=kill[@N], name=stop[@N] or name=delay:DURATION[@N]", entry)
		}
		s.points[name] = append(s.points[name], x)
	}
	return s, nil
}

func parsePoint(what string) (x point, err error) {
	what, nth, counted := strings.Cut(what, "@")
	if counted {
		if x.nth, err = strconv.Atoi(nth); err != nil || x.nth < 1 {
			return x, fmt.Errorf("@%s: must be a number from 1", nth)
		}
	}
	what, pause, timed := strings.Cut(what, ":")
	switch {
	case what == "delay" && timed:
		x.do = delay
		if x.pause, err = time.ParseDuration(pause); err == nil && x.pause < 0 {
			err = fmt.Errorf("%s is negative", pause)
		}
		return x, err
	case what == "kill" && !timed:
		x.do = kill
	case what == "stop" && !timed:
		x.do = stop
	default:
		return x, fmt.Errorf("%q is no action", what)
	}
	if !counted {
		x.nth = 1
	}
	return x, nil
}
