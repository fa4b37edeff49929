// Command report reads the output of "go test -json" and prints what a person wants
// of it: a line for each package, the output of what failed, what was skipped and
// why, and a summary. It ends with status 1 if anything failed.
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"sort"
	"strings"
	"time"
)

// event is one line of "go test -json": see "go doc test2json".
type event struct {
	Action     string
	Package    string
	ImportPath string
	Test       string
	Output     string
	Elapsed    float64
}

// maxOutputLines bounds what is kept of one test's output, in case it fails.
const maxOutputLines = 400

type report struct {
	out     io.Writer
	live    string // print output lines of tests in packages that contain this at once
	lines   map[string][]string
	passed  int
	failed  []string
	skipped []string
}

func main() {
	live := flag.String("live", "", "print the output of packages whose path contains this as it comes")
	flag.Parse()
	r := &report{out: os.Stdout, live: *live, lines: map[string][]string{}}
	start := time.Now()
	r.read(os.Stdin)
	if !r.summary(time.Since(start)) {
		os.Exit(1)
	}
}

func (r *report) read(in io.Reader) {
	scanner := bufio.NewScanner(in)
	scanner.Buffer(make([]byte, 64<<10), 16<<20) // one line of a test's output at most
	for scanner.Scan() {
		var e event
		if err := json.Unmarshal(scanner.Bytes(), &e); err != nil || e.Action == "" {
			fmt.Fprintln(r.out, scanner.Text()) // from the go command itself
			continue
		}
		r.event(e)
	}
	if err := scanner.Err(); err != nil {
		fmt.Fprintln(r.out, "report: read test output:", err)
		r.failed = append(r.failed, "the report itself")
	}
}

func short(pkg string) string {
	return strings.TrimPrefix(strings.TrimPrefix(pkg, "github.com/thaw-project/thaw"), "/")
}

func (r *report) event(e event) {
	key := e.Package + " " + e.Test
	if e.Package == "" {
		key = e.ImportPath
	}
	switch e.Action {
	case "output", "build-output":
		if len(r.lines[key]) < maxOutputLines {
			r.lines[key] = append(r.lines[key], e.Output)
		}
		if r.live != "" && strings.Contains(e.Package, r.live) {
			fmt.Fprint(r.out, e.Output)
		}
	case "pass":
		if e.Test != "" {
			r.passed++
		} else {
			fmt.Fprintf(r.out, "ok    %6.1fs  %s\n", e.Elapsed, short(e.Package))
		}
		delete(r.lines, key)
	case "skip":
		if e.Test != "" {
			r.skipped = append(r.skipped, fmt.Sprintf("%s %s: %s", short(e.Package), e.Test, r.reason(key)))
		}
		delete(r.lines, key)
	case "fail", "build-fail":
		name := strings.TrimSpace(short(e.Package) + " " + e.Test)
		if e.Action == "build-fail" {
			name = "build of " + e.ImportPath
		}
		r.failed = append(r.failed, name)
		fmt.Fprintf(r.out, "FAIL  %6.1fs  %s\n%s", e.Elapsed, name, strings.Join(r.lines[key], ""))
		delete(r.lines, key)
		if e.Test == "" && e.Action == "fail" {
			r.unfinished(e.Package)
		}
	}
}

// unfinished reports the tests of a package that ended without an end of theirs, as
// when the test process hung until it was killed.
func (r *report) unfinished(pkg string) {
	for _, key := range slices.Sorted(maps.Keys(r.lines)) {
		test, found := strings.CutPrefix(key, pkg+" ")
		if !found || test == "" {
			continue
		}
		r.failed = append(r.failed, short(pkg)+" "+test)
		fmt.Fprintf(r.out, "did not end: %s %s\n%s", short(pkg), test, strings.Join(r.lines[key], ""))
		delete(r.lines, key)
	}
}

// reason is the message of a skipped test, which go test prints as "file:line: text".
func (r *report) reason(key string) string {
	for _, line := range slices.Backward(r.lines[key]) {
		line = strings.TrimSpace(line)
		if _, text, found := strings.Cut(line, ".go:"); found {
			_, text, _ = strings.Cut(text, ": ")
			return text
		}
	}
	return "no reason given"
}

func (r *report) summary(took time.Duration) bool {
	if len(r.skipped) > 0 {
		fmt.Fprintf(r.out, "\nSkipped, and why:\n")
		sort.Strings(r.skipped)
		for _, s := range r.skipped {
			fmt.Fprintln(r.out, "  "+s)
		}
	}
	if len(r.failed) > 0 {
		fmt.Fprintf(r.out, "\nFailed:\n")
		for _, f := range r.failed {
			fmt.Fprintln(r.out, "  "+f)
		}
	}
	fmt.Fprintf(r.out, "\n%d passed, %d failed, %d skipped in %v\n", r.passed, len(r.failed), len(r.skipped), took.Round(time.Second))
	return len(r.failed) == 0
}
