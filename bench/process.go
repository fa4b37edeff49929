package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// used is what the threads of a process used since they began.
type used struct {
	cpuSeconds float64
	switches   float64 // voluntary and not
}

func (u used) minus(o used) used {
	return used{u.cpuSeconds - o.cpuSeconds, u.switches - o.switches}
}

// usedBy adds up the threads of a process. CPU time is the scheduler's, in ns; the
// clock ticks of /proc/pid/stat would be too coarse for a second.
func usedBy(pid int) (u used, err error) {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	if err != nil || len(tasks) == 0 {
		return u, fmt.Errorf("process %d has no threads: %v", pid, err)
	}
	for _, task := range tasks {
		// A thread that ended meanwhile is left out.
		stat, err := os.ReadFile(filepath.Join(task, "schedstat"))
		if err != nil {
			continue
		}
		ns, _, _ := strings.Cut(string(stat), " ")
		n, err := strconv.ParseFloat(ns, 64)
		if err != nil {
			return u, fmt.Errorf("%s/schedstat: %w", task, err)
		}
		u.cpuSeconds += n / 1e9
		status, err := os.ReadFile(filepath.Join(task, "status"))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(status)) {
			if key, value, _ := strings.Cut(line, ":"); strings.HasSuffix(key, "ctxt_switches") {
				n, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
				if err != nil {
					return u, fmt.Errorf("%s/status: %w", task, err)
				}
				u.switches += n
			}
		}
	}
	return u, nil
}

// window is what server and client used in the middle of a run.
type window struct {
	seconds        float64
	server, client used
}

// windowOf looks at both after two fifths of a run and after four.
func windowOf(server, client int, run time.Duration) (w window, err error) {
	look := func() (s, c used, at time.Time, err error) {
		if s, err = usedBy(server); err == nil {
			c, err = usedBy(client)
		}
		return s, c, time.Now(), err
	}
	time.Sleep(run * 2 / 5)
	s1, c1, begin, err := look()
	if err != nil {
		return w, err
	}
	time.Sleep(run * 2 / 5)
	s2, c2, end, err := look()
	return window{end.Sub(begin).Seconds(), s2.minus(s1), c2.minus(c1)}, err
}

// cpuOf is what a process used since its start, threads that ended included, in seconds.
// The kernel counts by the nanosecond and tells it in hundredths of a second.
func cpuOf(pid int) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The name of the program, in parentheses, may hold anything.
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(fields) < 13 {
		return 0, fmt.Errorf("/proc/%d/stat: %q", pid, b)
	}
	var ticks float64
	for _, f := range fields[11:13] {
		n, err := strconv.ParseFloat(f, 64)
		if err != nil {
			return 0, fmt.Errorf("/proc/%d/stat: %w", pid, err)
		}
		ticks += n
	}
	return ticks / 100, nil
}
