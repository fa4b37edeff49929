package sockio

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pair returns both ends of a connection.
func pair(t testing.TB, network string) (a, b net.Conn) {
	t.Helper()
	address := "127.0.0.1:0"
	if network == "unix" {
		address = t.TempDir() + "/s"
	}
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if a, err = net.Dial(network, l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if b, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		a.Close()
		b.Close()
	})
	return a, b
}

// TestRead sends pieces at all kinds of intervals and compares.
func TestRead(t *testing.T) {
	for _, network := range []string{"tcp", "unix"} {
		t.Run(network, func(t *testing.T) {
			a, b := pair(t, network)
			rng := rand.New(rand.NewPCG(1, 2))
			want := make([]byte, 1<<20)
			for i := range want {
				want[i] = byte(rng.Uint32())
			}
			go func() {
				for p := want; len(p) > 0; {
					n := min(len(p), 1+rng.IntN(8192))
					a.Write(p[:n])
					p = p[n:]
					if rng.IntN(4) == 0 {
						time.Sleep(time.Duration(rng.IntN(200)) * time.Microsecond)
					}
				}
				a.Close()
			}()
			got, err := io.ReadAll(NewReader(b))
			if err != nil || !bytes.Equal(got, want) {
				t.Fatalf("%d bytes of %d, equal: %t, %v", len(got), len(want), bytes.Equal(got, want), err)
			}
		})
	}
}

// TestPipe reads what is no socket.
func TestPipe(t *testing.T) {
	a, b := net.Pipe()
	defer b.Close()
	go func() {
		a.Write([]byte("x"))
		a.Close()
	}()
	if got, err := io.ReadAll(NewReader(b)); err != nil || string(got) != "x" {
		t.Fatalf("%q, %v", got, err)
	}
}

// TestClose ends a Read that sleeps.
func TestClose(t *testing.T) {
	_, b := pair(t, "tcp")
	parked := make(chan struct{})
	r := NewReader(b)
	r.Park = func(p []byte) []byte {
		close(parked)
		return p
	}
	done := make(chan error)
	go func() {
		_, err := r.Read(make([]byte, 1))
		done <- err
	}()
	<-parked
	b.Close()
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Fatal(err)
	}
}

// TestPark: a Read that sleeps goes on with the other buffer.
func TestPark(t *testing.T) {
	a, b := pair(t, "unix")
	r := NewReader(b)
	small, large := make([]byte, 1), make([]byte, 100)
	r.Park = func(p []byte) []byte {
		if &p[0] != &large[0] {
			t.Error("not the buffer of Read")
		}
		a.Write([]byte("xy"))
		return small
	}
	if n, err := r.Read(large); n != 1 || err != nil || small[0] != 'x' {
		t.Fatalf("%d bytes, %v, %q", n, err, small)
	}
	if n, err := r.Read(large); n != 1 || err != nil || large[0] != 'y' {
		t.Fatalf("%d bytes, %v, %q", n, err, large[:n])
	}
}

// TestPoller follows its credit, without a clock: try says whether there is something.
func TestPoller(t *testing.T) {
	found, nothing := func() bool { return true }, func() bool { return false }
	var p Poller
	wait := func(try func() bool) bool {
		got := p.Wait(try)
		if !got && p.Wait(func() bool { t.Error("polled after it slept"); return true }) {
			t.Error("polled after it slept")
		}
		p.Done()
		p.last, p.slept = 0, time.Time{} // a wait as short as any
		return got
	}
	for range probeEvery - 1 {
		if wait(found) {
			t.Fatal("polls without a reason")
		}
	}
	if !wait(found) {
		t.Fatal("does not probe")
	}
	for range maxCredit {
		if !wait(found) {
			t.Fatal("does not poll though polling helps")
		}
	}
	for range maxCredit / missCost {
		if wait(nothing) {
			t.Fatal("found nothing, and says so not")
		}
	}
	if p.credit != 0 || wait(found) {
		t.Fatalf("polls though it did not help; credit %d", p.credit)
	}
	p.credit, p.slept = maxCredit, time.Now().Add(-2*awakeMax)
	if p.Wait(found) {
		t.Fatal("does not sleep for long")
	}
	p.Done()
	p.credit, p.last = 0, 2*probeWithin
	for range 2 * probeEvery {
		if p.Wait(found) {
			t.Fatal("probes an idle peer")
		}
		p.Done()
		p.last = 2 * probeWithin
	}
}

// TestPollersBounded: one poll at a time on one CPU.
func TestPollersBounded(t *testing.T) {
	for range maxPolling() {
		polling.Add(1)
		defer polling.Add(-1)
	}
	p := Poller{credit: maxCredit}
	if p.Wait(func() bool { return true }) {
		t.Fatal("polls beside too many others")
	}
}

func TestReadAllocations(t *testing.T) {
	a, b := pair(t, "unix")
	r := NewReader(b)
	p := make([]byte, 16)
	if n := testing.AllocsPerRun(200, func() {
		if _, err := a.Write(p); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Read(p); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// BenchmarkPingPong is a round trip of one byte between two goroutines.
func BenchmarkPingPong(b *testing.B) {
	x, y := pair(b, "tcp")
	go func() {
		r, p := NewReader(y), make([]byte, 1)
		for {
			if _, err := r.Read(p); err != nil {
				return
			}
			y.Write(p)
		}
	}()
	r, p := NewReader(x), make([]byte, 1)
	b.ReportAllocs()
	for b.Loop() {
		x.Write(p)
		if _, err := r.Read(p); err != nil {
			b.Fatal(err)
		}
	}
}
