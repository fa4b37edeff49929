package target_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/spdk"
	"github.com/thaw-project/thaw/target"
)

// SPDK_SOCK is the socket of an SPDK, or of any target, that TestSPDK asks instead of one
// in this process. SPDK_USED=1 lets it ask one that has a configuration already.
const spdkSocket, spdkUsed = "SPDK_SOCK", "SPDK_USED"

// spdkPrefix begins the names of all that TestSPDK makes, and removes.
const spdkPrefix, spdkNQN = "thawtest-", "nqn.2014-08.org.thaw-project:spdk-test:"

// TestSPDK holds what SPDK's methods answer, in testdata/spdk: every method and every
// error that Thaw relies on. The embedded target must answer so, and so must the SPDK of
// SPDK_SOCK ("make test-spdk").
//
// Lines are "> request", and "< answer", or "| answer" for another that will do too. "#" is a
// comment. "! file NAME BYTES" makes a sparse file in $dir; "! needs METHOD..." leaves out
// the rest of the file, and says so, where the target has not been built with a method;
// "! until" sends the next request again until it is answered as expected, for 30 s.
//
// An answer is compared as JSON, its id left out. In what is expected, "$any" is any
// value. Any other text that begins with "$" is bound to what comes first and must be the
// same afterwards; a request with a text that was never bound, because another answer than
// the one with it came, is left out, and said. The member "..." of an object allows
// members that are not listed, which differ between versions; the element "..." of a
// list allows others, in between. $dir is a folder, $port a free port of 127.0.0.1, $p and
// $nqn begin names.
//
// What cannot be compared is left to "$any": sizes and free space, which follow from how a
// blobstore lays out its metadata; versions; and the texts of errors, whose codes alone are
// kept between SPDK's versions.
func TestSPDK(t *testing.T) {
	socket := os.Getenv(spdkSocket)
	own := socket == ""
	if own {
		socket = start(t, target.Options{MallocBytes: 1 << 30}).socket
	}
	client, err := spdk.New(spdk.Options{Socket: socket, Deadline: time.Minute, LongDeadline: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	version, err := client.GetVersion(t.Context())
	if err != nil {
		t.Fatalf("%s: %v", socket, err)
	}
	t.Logf("asks %s: %s", socket, version.Version)
	if found := configured(t, client); len(found) > 0 && os.Getenv(spdkUsed) != "1" {
		t.Fatalf("%s has a configuration already: %s. Take an SPDK that has none, or set %s=1 to have the test work beside it: it makes and removes only what begins with %s or %s, and a TCP transport, which stays",
			socket, strings.Join(found, ", "), spdkUsed, spdkPrefix, spdkNQN)
	}
	var methods []string
	if err := client.Call(t.Context(), "rpc_get_methods", nil, &methods); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob("testdata/spdk/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no transcripts", err)
	}
	for _, f := range files {
		t.Run(strings.TrimSuffix(filepath.Base(f), ".txt"), func(t *testing.T) {
			s := &asker{t: t, socket: socket, methods: methods, own: own, bound: map[string]string{"dir": shortDir(t), "port": freePort(t), "p": strings.TrimSuffix(spdkPrefix, "-"), "nqn": strings.TrimSuffix(spdkNQN, ":")}}
			removeOwn(t, client)
			t.Cleanup(func() { removeOwn(t, client) })
			s.play(f)
		})
	}
	if !t.Failed() && len(configured(t, client)) > 0 && own {
		t.Errorf("left: %v", configured(t, client))
	}
}

// configured says what a target has been told to have, but for transports: they cannot be
// removed.
func configured(t *testing.T, c *spdk.Client) (found []string) {
	t.Helper()
	ctx := t.Context()
	bdevs, err := c.BdevGetBdevs(ctx, spdk.BdevGetBdevsParams{})
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range bdevs {
		found = append(found, "bdev "+b.Name)
	}
	subsystems, err := c.NvmfGetSubsystems(ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range subsystems {
		if s.Subtype == spdk.SubtypeNVMe || len(s.Listeners) > 0 {
			found = append(found, "subsystem "+s.NQN)
		}
	}
	return found
}

// removeOwn removes all that this test makes, also what an earlier one left behind that
// was killed.
func removeOwn(t *testing.T, c *spdk.Client) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var errs []error
	try := func(err error) {
		if err != nil && !errors.Is(err, kind.NotFound) && !errors.Is(err, kind.Unsupported) {
			errs = append(errs, err)
		}
	}
	subsystems, err := c.NvmfGetSubsystems(ctx, "")
	try(err)
	for _, s := range subsystems {
		if strings.HasPrefix(s.NQN, spdkNQN) {
			try(c.NvmfDeleteSubsystem(ctx, s.NQN))
		}
	}
	controllers, err := c.BdevNVMeGetControllers(ctx, "")
	try(err)
	for _, r := range controllers {
		if strings.HasPrefix(r.Name, spdkPrefix) {
			try(c.BdevNVMeDetachController(ctx, r.Name, spdk.TransportID{}))
		}
	}
	stores, err := c.BdevLvolGetLvstores(ctx, "")
	try(err)
	for _, s := range stores {
		if strings.HasPrefix(s.Name, spdkPrefix) {
			try(c.BdevLvolDeleteLvstore(ctx, s.Name))
		}
	}
	bdevs, err := c.BdevGetBdevs(ctx, spdk.BdevGetBdevsParams{})
	try(err)
	for _, b := range bdevs {
		if !strings.HasPrefix(b.Name, spdkPrefix) {
			continue
		}
		switch b.ProductName {
		case spdk.ProductAIO:
			try(c.BdevAIODelete(ctx, b.Name))
		case spdk.ProductMalloc:
			try(c.BdevMallocDelete(ctx, b.Name))
		case spdk.ProductNull:
			try(c.BdevNullDelete(ctx, b.Name))
		}
	}
	if err := errors.Join(errs...); err != nil {
		t.Errorf("remove what the test made: %v", err)
	}
}

// asker plays one file.
type asker struct {
	t       *testing.T
	socket  string
	methods []string
	own     bool
	bound   map[string]string
	nc      net.Conn
	dec     *json.Decoder
	id      int
}

var variable = regexp.MustCompile(`\$[a-z][a-z0-9]*`)

func (s *asker) play(path string) {
	s.t.Helper()
	f, err := os.Open(path)
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	if s.nc, err = net.Dial("unix", s.socket); err != nil {
		s.t.Fatal(err)
	}
	defer s.nc.Close()
	s.dec = json.NewDecoder(s.nc)
	s.dec.UseNumber()
	request, at, until := "", 0, false
	var answers []string
	flush := func() {
		if request != "" {
			s.ask(fmt.Sprintf("%s:%d", path, at), request, answers, until)
		}
		if request != "" {
			until = false
		}
		request, answers = "", nil
	}
	lines := bufio.NewScanner(f)
	for n := 1; lines.Scan(); n++ {
		line := lines.Text()
		switch {
		case line == "" || strings.HasPrefix(line, "#"):
		case strings.HasPrefix(line, "> "):
			flush()
			request, at = line[2:], n
		case strings.HasPrefix(line, "< "), strings.HasPrefix(line, "| "):
			answers = append(answers, line[2:])
		case line == "! until":
			flush()
			until = true
		case strings.HasPrefix(line, "! needs "):
			flush()
			for _, m := range strings.Fields(line[8:]) {
				if !slices.Contains(s.methods, m) {
					s.t.Skipf("%s:%d: this target has no method %s: what follows was not asked", path, n, m)
				}
			}
		case strings.HasPrefix(line, "! file "):
			flush()
			var name string
			var size int64
			if _, err := fmt.Sscanf(line, "! file %s %d", &name, &size); err != nil {
				s.t.Fatalf("%s:%d: %v", path, n, err)
			}
			file(s.t, s.bound["dir"], name, size)
		default:
			s.t.Fatalf("%s:%d: %q", path, n, line)
		}
	}
	flush()
}

// ask sends a request and compares the answer.
func (s *asker) ask(at, request string, answers []string, until bool) {
	s.t.Helper()
	missing := ""
	request = variable.ReplaceAllStringFunc(request, func(v string) string {
		value, ok := s.bound[v[1:]]
		if !ok {
			missing = v
		}
		return value
	})
	if missing != "" {
		s.t.Logf("%s: left out: there was no %s: %s", at, missing, request)
		return
	}
	var call struct {
		Method string          `json:"method"`
		Params json.RawMessage `json:"params,omitempty"`
	}
	if err := json.Unmarshal([]byte(request), &call); err != nil {
		s.t.Fatalf("%s: %v: %s", at, err, request)
	}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		got := s.call(at, call)
		var why []string
		for _, want := range answers {
			bound := map[string]string{}
			err := s.match(want, got, bound)
			if err == nil {
				for k, v := range bound {
					s.bound[k] = v
				}
				return
			}
			why = append(why, fmt.Sprintf("want %s\n     %v", want, err))
		}
		if !until || time.Now().After(deadline) {
			text, _ := json.Marshal(got) // it was JSON
			s.t.Errorf("%s: %s\n got %s\n%s", at, request, text, strings.Join(why, "\n"))
			return
		}
	}
}

func (s *asker) call(at string, call any) map[string]any {
	s.t.Helper()
	raw, err := json.Marshal(call)
	if err != nil {
		s.t.Fatal(err)
	}
	s.id++
	s.nc.SetDeadline(time.Now().Add(time.Minute))
	if _, err := fmt.Fprintf(s.nc, `{"jsonrpc":"2.0","id":%d,%s`, s.id, raw[1:]); err != nil {
		s.t.Fatalf("%s: %v", at, err)
	}
	var got map[string]any
	if err := s.dec.Decode(&got); err != nil {
		s.t.Fatalf("%s: answer: %v", at, err)
	}
	if got["id"] != json.Number(fmt.Sprint(s.id)) || got["jsonrpc"] != "2.0" {
		s.t.Errorf("%s: not the answer to request %d: %v", at, s.id, got)
	}
	delete(got, "id")
	delete(got, "jsonrpc")
	return got
}

// match compares an answer with what is expected.
func (s *asker) match(want string, got any, bound map[string]string) error {
	var w any
	d := json.NewDecoder(bytes.NewReader([]byte(want)))
	d.UseNumber()
	if err := d.Decode(&w); err != nil {
		return fmt.Errorf("what is expected is not JSON: %w", err)
	}
	return s.same("answer", w, got, bound)
}

func (s *asker) same(at string, want, got any, bound map[string]string) error {
	differs := fmt.Errorf("%s is %v, not %v", at, got, want)
	switch w := want.(type) {
	case string:
		return s.sameText(at, w, got, bound)
	case map[string]any:
		g, ok := got.(map[string]any)
		if !ok {
			return differs
		}
		_, more := w["..."]
		for k := range g {
			if _, listed := w[k]; !listed && !more {
				return fmt.Errorf("%s has %s, which is not expected", at, k)
			}
		}
		for k, v := range w {
			if k == "..." {
				continue
			}
			have, ok := g[k]
			if !ok {
				return fmt.Errorf("%s has no %s", at, k)
			}
			if err := s.same(at+"."+k, v, have, bound); err != nil {
				return err
			}
		}
		return nil
	case []any:
		g, ok := got.([]any)
		if !ok {
			return differs
		}
		return s.sameList(at, w, g, bound)
	}
	if want != got {
		return differs
	}
	return nil
}

func (s *asker) sameText(at, want string, got any, bound map[string]string) error {
	if want == "$any" {
		return nil
	}
	g, ok := got.(string)
	if !ok {
		return fmt.Errorf("%s is %v, not %q", at, got, want)
	}
	if name := strings.TrimPrefix(want, "$"); variable.FindString(want) == want && s.bound[name] == "" && bound[name] == "" {
		if g == "" {
			return fmt.Errorf("%s is empty", at)
		}
		bound[name] = g
		return nil
	}
	full := variable.ReplaceAllStringFunc(want, func(v string) string { return s.bound[v[1:]] + bound[v[1:]] })
	if !strings.EqualFold(full, g) { // hexadecimal digits come either way
		return fmt.Errorf("%s is %q, not %q", at, g, full)
	}
	return nil
}

func (s *asker) sameList(at string, want, got []any, bound map[string]string) error {
	i, more := 0, false
	for _, w := range want {
		if w == "..." {
			more = true
			continue
		}
		for ; ; i++ {
			if i >= len(got) {
				return fmt.Errorf("%s has no %v", at, w)
			}
			try := map[string]string{}
			for k, v := range bound {
				try[k] = v
			}
			err := s.same(fmt.Sprintf("%s[%d]", at, i), w, got[i], try)
			if err == nil {
				for k, v := range try {
					bound[k] = v
				}
				i++
				break
			}
			if !more {
				return err
			}
		}
	}
	if !more && i < len(got) {
		return fmt.Errorf("%s has %d elements more: %v", at, len(got)-i, got[i:])
	}
	return nil
}
