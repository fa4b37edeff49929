package rpc

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/thaw-project/thaw/kind"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// methods for tests: echo answers its parameters, wait waits for the connection's end.
func methods(waiting chan<- struct{}) map[string]Method {
	return map[string]Method{
		"echo": {Handle: func(_ context.Context, p json.RawMessage) (any, error) { return p, nil }},
		"fail": {Handle: func(context.Context, json.RawMessage) (any, error) { return nil, io.ErrShortWrite }},
		"panic": {Handle: func(context.Context, json.RawMessage) (any, error) {
			panic("a bug")
		}},
		"wait": {Waits: true, Handle: func(ctx context.Context, _ json.RawMessage) (any, error) {
			waiting <- struct{}{}
			<-ctx.Done()
			return nil, ctx.Err()
		}},
	}
}

func serve(t testing.TB, o Options) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "rpc-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if o.Methods == nil {
		o.Methods = methods(make(chan struct{}, 100))
	}
	s := Serve(l, o)
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(path); err == nil {
			t.Error("the socket is still there")
		}
	})
	return path
}

func dial(t testing.TB, path string) *net.UnixConn {
	t.Helper()
	nc, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(time.Minute)) // only ends a test that has failed
	return nc.(*net.UnixConn)
}

// exchange sends text, closes the sending side, and returns all answers.
func exchange(t testing.TB, path, text string) string {
	t.Helper()
	nc := dial(t, path)
	io.WriteString(nc, text) // the server may have closed
	nc.CloseWrite()
	p, err := io.ReadAll(nc)
	if err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Fatal(err)
	}
	return string(p)
}

const echo1 = `{"jsonrpc":"2.0","id":1,"method":"echo","params":{"a":1}}`

func TestExchange(t *testing.T) {
	path := serve(t, Options{})
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode of the socket: %v %v", st.Mode(), err)
	}
	const answer = `{"jsonrpc":"2.0","id":1,"result":{"a":1}}` + "\n"
	parse := `{"jsonrpc":"2.0","id":null,"error":{"code":-32700,"message":"Parse error"}}` + "\n"
	for _, c := range []struct{ name, send, want string }{
		{"half-closed", echo1, answer},
		{"pipelined", strings.Repeat(echo1, 50), strings.Repeat(answer, 50)},
		{"blank between", "\n\t " + echo1 + " \r\n" + echo1 + "\n", answer + answer},
		{"nothing", "", ""},
		{"unfinished", echo1 + `{"jsonrpc":"2.0",`, answer},
		{"garbage", "hello", parse},
		{"garbage after a request", echo1 + "}" + echo1, answer + parse},
		{"bytes", "\x00\xff\xfe", parse},
		{"no UTF-8", `{"jsonrpc":"2.0","id":1,"method":"` + "\xff" + `"}`, parse},
		{"too deep", strings.Repeat("[", 65) + strings.Repeat("]", 65), parse},
		{"much too deep", strings.Repeat("[", 100_000), parse},
		{"too long", `{"a":"` + strings.Repeat("x", MaxRequestBytes), parse},
		{"too much blank", strings.Repeat(" ", MaxRequestBytes+1) + echo1, parse},
		{"error without a code", `{"id":1,"method":"fail"}`, `{"jsonrpc":"2.0","id":1,"error":{"code":-32603,"message":"Internal error"}}` + "\n"},
		{"panic", `{"id":1,"method":"panic"}` + echo1, `{"jsonrpc":"2.0","id":1,"error":{"code":-32603,"message":"Internal error"}}` + "\n" + answer},
		{"a long id", `{"id":"` + strings.Repeat("i", 1000) + `","method":"echo","params":{}}`, `{"jsonrpc":"2.0","id":"` + strings.Repeat("i", 1000) + `","result":{}}` + "\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := exchange(t, path, c.send); got != c.want {
				t.Errorf("got %.300q, want %.300q", got, c.want)
			}
		})
	}
}

// TestDeepest sends what is just within the bounds.
func TestDeepest(t *testing.T) {
	path := serve(t, Options{})
	deep := strings.Repeat("[", 62) + strings.Repeat("]", 62)
	r := `{"id":1,"method":"echo","params":{"a":` + deep + `}}`
	if got := exchange(t, path, r); !strings.Contains(got, deep) {
		t.Errorf("got %.200q", got)
	}
	long := `{"id":1,"method":"echo","params":{"a":"` + strings.Repeat("x", MaxRequestBytes-60) + `"}}`
	if got := exchange(t, path, long+echo1); len(got) < MaxRequestBytes-60 || strings.Count(got, "\n") != 2 {
		t.Errorf("got %d bytes, %d answers", len(got), strings.Count(got, "\n"))
	}
}

// TestBatchBound sends a batch whose answers are more than anybody wants.
func TestBatchBound(t *testing.T) {
	calls := 0
	big := strings.Repeat("x", 1<<20)
	path := serve(t, Options{Methods: map[string]Method{"big": {Handle: func(context.Context, json.RawMessage) (any, error) { calls++; return big, nil }}}})
	got := exchange(t, path, "["+strings.Repeat(`{"id":1,"method":"big"},`, 99)+`{"id":1,"method":"big"}]`)
	var list []struct {
		Result string
		Error  *Error
	}
	if err := json.Unmarshal([]byte(got), &list); err != nil || len(list) != 100 {
		t.Fatalf("%d answers, %v", len(list), err)
	}
	if calls > 33 || len(got) > 40<<20 || list[99].Error == nil || list[0].Error != nil {
		t.Errorf("%d calls, %d bytes, the last is %v", calls, len(got), list[99].Error)
	}
}

// TestSlow has a client that stops in the middle of a request, one that does not read
// its answers, and one that is idle: the first two go, the last stays.
func TestSlow(t *testing.T) {
	path := serve(t, Options{Patience: 200 * time.Millisecond})
	idle := dial(t, path)
	stalled := dial(t, path)
	io.WriteString(stalled, echo1[:20])
	deaf := dial(t, path)
	big := `{"id":1,"method":"echo","params":{"a":"` + strings.Repeat("x", 100_000) + `"}}`
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		for range 1000 {
			if _, err := io.WriteString(deaf, big); err != nil {
				return
			}
		}
	}()
	if p, err := io.ReadAll(stalled); err != nil || len(p) > 0 {
		t.Errorf("the stalled client got %q, %v", p, err)
	}
	<-sent // the server gave up: our writes failed
	io.WriteString(idle, echo1)
	if line, err := bufio.NewReader(idle).ReadString('\n'); err != nil {
		t.Errorf("the idle client got %q, %v", line, err)
	}
}

// TestCrowd opens more connections than there may be: each newcomer takes the place of
// the one that has been idle longest, also when that waits in a method.
func TestCrowd(t *testing.T) {
	const limit = 8
	waiting := make(chan struct{}, 100)
	path := serve(t, Options{MaxConns: limit, Methods: methods(waiting)})
	waits := dial(t, path)
	io.WriteString(waits, `{"id":1,"method":"wait"}`)
	<-waiting
	for range 100 {
		nc := dial(t, path)
		io.WriteString(nc, echo1)
		if line, err := bufio.NewReader(nc).ReadString('\n'); err != nil {
			t.Fatalf("got %q, %v", line, err)
		}
	}
	if p, err := io.ReadAll(waits); err != nil || len(p) > 0 {
		t.Errorf("the waiting client got %q, %v", p, err)
	}
}

// TestMemory lets every connection hold as much as it can.
func TestMemory(t *testing.T) {
	path := serve(t, Options{Patience: time.Minute})
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	var wg sync.WaitGroup
	for range 64 {
		nc := dial(t, path)
		wg.Go(func() { io.WriteString(nc, `{"a":"`+strings.Repeat("x", MaxRequestBytes-100)) })
	}
	wg.Wait()
	if took := int64(heap()) - int64(before); took > 80<<20 {
		t.Errorf("64 connections took %d MiB", took>>20)
	}
	if got := exchange(t, path, echo1); got != "" {
		t.Logf("answered beside: %s", got) // all are in the middle of a request, so none makes room
	}
}

func TestListen(t *testing.T) {
	path := serve(t, Options{})
	if _, err := Listen(path); !errors.Is(err, kind.InUse) {
		t.Errorf("a socket in use: %v", err)
	}
	other := path + ".file"
	if err := os.WriteFile(other, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(other); !errors.Is(err, kind.Exists) {
		t.Errorf("a file: %v", err)
	}
	stale := path + ".stale"
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	again, err := Listen(stale)
	if err != nil {
		t.Fatalf("a stale socket: %v", err)
	}
	again.Close()
	if _, err := Listen("/tmp/" + strings.Repeat("x", 120)); !errors.Is(err, kind.Invalid) {
		t.Errorf("a long path: %v", err)
	}
}

func TestDecode(t *testing.T) {
	type inner struct {
		X uint16 `json:"x"`
	}
	type params struct {
		Name  string   `json:"name"`
		Size  uint64   `json:"size,omitempty"`
		Int   int32    `json:"int,omitempty"`
		Flag  *bool    `json:"flag,omitempty"`
		Inner inner    `json:"inner,omitempty"`
		List  []string `json:"list,omitempty"`
	}
	for _, c := range []struct{ in, want string }{
		{`{"name":"a"}`, ""},
		{`{"name":"a","size":18446744073709551615,"int":-5,"flag":false,"inner":{"x":65535},"list":["b","c"]}`, ""},
		{`{"name":"a","size":1e3}`, ""},
		{`{}`, `parameter "name": missing`},
		{`[]`, "not an object"},
		{`{"name":null}`, `parameter "name": not a string`},
		{`{"name":"a\u0000b"}`, `parameter "name": has a zero byte`},
		{`{"name":"a","size":"1"}`, `parameter "size": not a natural number of 64 bits`},
		{`{"name":"a","size":1.5}`, `parameter "size": not a natural number of 64 bits`},
		{`{"name":"a","size":-1}`, `parameter "size": not a natural number of 64 bits`},
		{`{"name":"a","size":1e300}`, `parameter "size": not a natural number of 64 bits`},
		{`{"name":"a","int":2147483648}`, `parameter "int": not an integer of 32 bits`},
		{`{"name":"a","flag":0}`, `parameter "flag": not a boolean`},
		{`{"name":"a","inner":{"x":65536}}`, `parameter "inner.x": not a natural number of 16 bits`},
		{`{"name":"a","inner":{"x":1,"y":2}}`, `parameter "inner.y": unknown`},
		{`{"name":"a","inner":7}`, `parameter "inner": not an object`},
		{`{"name":"a","list":["b",1]}`, `parameter "list": not a string`},
		{`{"name":"a","list":{}}`, `parameter "list": not an array`},
		{`{"name":"a","NAME":"b"}`, `parameter "NAME": unknown`},
		{`{"name":"a","name":"b"}`, `parameter "name": given twice`},
	} {
		var p params
		err := Decode(json.RawMessage(c.in), &p)
		if got := fmt.Sprint(err); got != c.want && !(err == nil && c.want == "") {
			t.Errorf("%s: %v, want %s", c.in, err, c.want)
		}
	}
	var p params
	if err := Decode(json.RawMessage(`{"name":"a","size":1e3,"flag":true,"list":["x"]}`), &p); err != nil || p.Size != 1000 || p.Flag == nil || !*p.Flag || len(p.List) != 1 {
		t.Errorf("%+v %v", p, err)
	}
}

// FuzzServer sends arbitrary bytes: whatever comes back is a line of JSON-RPC for each
// answer, and a sound request on another connection is answered as ever.
func FuzzServer(f *testing.F) {
	for _, s := range []string{echo1, echo1 + echo1, `[` + echo1 + `,7]`, `{"id":1,"method":"fail"}`, "{", "}", `{"a":"\u12`, "[[[[", "1 2 3", "\xff"} {
		f.Add([]byte(s))
	}
	path := serve(f, Options{Patience: 10 * time.Second})
	f.Fuzz(func(t *testing.T, in []byte) {
		for _, line := range strings.Split(strings.TrimSuffix(exchange(t, path, string(in)), "\n"), "\n") {
			if line == "" {
				continue
			}
			var one struct {
				Version string          `json:"jsonrpc"`
				Result  json.RawMessage `json:"result"`
				Error   *Error          `json:"error"`
			}
			if strings.HasPrefix(line, "[") {
				continue
			}
			if err := json.Unmarshal([]byte(line), &one); err != nil || one.Version != "2.0" || (one.Result == nil) == (one.Error == nil) {
				t.Fatalf("answer %q: %v", line, err)
			}
		}
		if got := exchange(t, path, echo1); !strings.Contains(got, `"result":{"a":1}`) {
			t.Fatalf("afterwards a sound request gets %q", got)
		}
	})
}

// FuzzDecode compares the decoder with encoding/json: what it accepts, that accepts too,
// with the same values.
func FuzzDecode(f *testing.F) {
	for _, s := range []string{`{"name":"a"}`, `{"name":"a","size":7,"deep":{"n":-1}}`, `{"name":"\u00e9","list":[1,2]}`, `{"name":1}`, `{"size":1e2,"name":"x"}`} {
		f.Add([]byte(s))
	}
	type params struct {
		Name string `json:"name"`
		Size uint64 `json:"size,omitempty"`
		Deep struct {
			N int32 `json:"n"`
		} `json:"deep,omitempty"`
		List []uint32 `json:"list,omitempty"`
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		if !json.Valid(in) {
			return
		}
		var ours, theirs params
		if Decode(in, &ours) != nil {
			return
		}
		d := json.NewDecoder(strings.NewReader(string(in)))
		d.DisallowUnknownFields()
		if err := d.Decode(&theirs); err != nil {
			var number *json.UnmarshalTypeError
			if errors.As(err, &number) && strings.HasPrefix(number.Value, "number") {
				return // 1e2 for an integer is SPDK's liberty
			}
			t.Fatalf("%s: accepted, but %v", in, err)
		}
		if fmt.Sprint(ours) != fmt.Sprint(theirs) {
			t.Fatalf("%s: %v, encoding/json says %v", in, ours, theirs)
		}
	})
}
