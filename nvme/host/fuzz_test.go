package host

import (
	"bytes"
	"context"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/thaw-project/thaw/nvme"
)

// FuzzTarget lets a target answer with any bytes while a read and a write are in
// flight: both end, and what the target sends goes nowhere but into the read.
func FuzzTarget(f *testing.F) {
	b := make([]byte, 256)
	var ok []byte
	add := func(n int, tail ...byte) { ok = append(append(ok, b[:n]...), tail...) }
	none := nvme.Digests{}
	add(nvme.PutR2T(b, &nvme.Data{CID: 1, Length: 8192}, none))
	add(nvme.PutData(b, nvme.TypeC2HData, nvme.FlagLast, &nvme.Data{CID: 0, Length: 4096}, none, 4), make([]byte, 4096)...)
	add(nvme.PutCapsuleResp(b, &nvme.Completion{CID: 0}, none))
	add(nvme.PutCapsuleResp(b, &nvme.Completion{CID: 1, Status: nvme.InternalError}, none))
	f.Add(bytes.Clone(ok), false)
	ok = ok[:0]
	g := nvme.Digests{Header: true, Data: true}
	add(nvme.PutR2T(b, &nvme.Data{CID: 0, Length: 8192}, g))
	add(nvme.PutData(b, nvme.TypeC2HData, nvme.FlagLast|nvme.FlagSuccess, &nvme.Data{CID: 1, Length: 4096}, g, 4), make([]byte, 4100)...)
	add((&nvme.Term{Type: nvme.TypeC2HTermReq, Status: nvme.FatalHeaderDigest}).Put(b, nil))
	f.Add(bytes.Clone(ok), true)
	f.Fuzz(func(t *testing.T, answer []byte, digests bool) {
		var wg sync.WaitGroup
		c := Config{HeaderDigest: digests, DataDigest: digests, Dial: func(context.Context, string) (net.Conn, error) {
			us, them := net.Pipe()
			wg.Add(2)
			sent := make(chan struct{})
			go func() {
				defer wg.Done()
				b := make([]byte, nvme.ICLen)
				_, _ = io.ReadFull(them, b)
				(&nvme.ICResp{MaxH2CData: 4096, Digests: nvme.Digests{Header: digests, Data: digests}}).Put(b)
				_, _ = them.Write(b)
				close(sent)
				_, _ = io.Copy(io.Discard, them)
			}()
			go func() {
				defer wg.Done()
				<-sent
				_, _ = them.Write(answer)
				_ = them.Close()
			}()
			return us, nil
		}}
		c.SubNQN, c.Portals = nvme.DiscoveryNQN, []string{"x"}
		if err := c.fill(); err != nil {
			t.Fatal(err)
		}
		var now atomic.Int64
		q, err := dialQueue(context.Background(), &c, "x", 1, 4, &now)
		if err != nil {
			t.Fatal(err)
		}
		q.inCap = 0
		q.onEvent = func(uint32) {}
		around := bytes.Repeat([]byte{0x5a}, 3*4096)
		done := make(chan struct{}, 2)
		go func() {
			cmd := nvme.Command{Opcode: nvme.OpRead}
			_, _ = q.do(&cmd, toHost, around[4096:8192])
			done <- struct{}{}
		}()
		go func() {
			cmd := nvme.Command{Opcode: nvme.OpWrite}
			_, _ = q.do(&cmd, toTarget, make([]byte, 8192))
			done <- struct{}{}
		}()
		for range 2 {
			select {
			case <-done:
			case <-time.After(20 * time.Second):
				t.Fatal("a command never ends")
			}
		}
		q.close()
		wg.Wait()
		for i, v := range around {
			if (i < 4096 || i >= 8192) && v != 0x5a {
				t.Fatalf("byte %d outside the read was written", i-4096)
			}
		}
	})
}
