package spdk_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"github.com/thaw-project/thaw/spdk"
)

// FuzzAnswer lets a server answer with arbitrary bytes, then end: the call returns, with
// a result or an error, and the next call is answered.
func FuzzAnswer(f *testing.F) {
	for _, s := range []string{`{"jsonrpc":"2.0","id":1,"result":[]}`, `{"id":1,"error":{"code":-19,"message":"No such device"}}`, `{"id":1,"result":[{"name":"a","driver_specific":{"lvol":{"clones":["x"]},"nvme":[{"trid":{}}]}}]}`,
		`{"id":1,"result":[{"driver_specific":7}]}{"id":2}`, `{"id":1`, `[`, `{"id":18446744073709551616,"result":1}`, "\x00\xff"} {
		f.Add([]byte(s))
	}
	answers := make(chan []byte, 1)
	socket := script(f, func(_ int, nc *net.UnixConn, in *bufio.Reader) {
		for {
			r := request(in)
			if r.ID == 0 {
				return
			}
			if r.Method != "spdk_get_version" {
				nc.Write(bytes.ReplaceAll(<-answers, []byte(`"id":1`), fmt.Appendf(nil, `"id":%d`, r.ID)))
				nc.CloseWrite()
				io.Copy(io.Discard, in)
				return
			}
			fmt.Fprintf(nc, `{"id":%d,"result":{"version":"sound"}}`, r.ID)
		}
	})
	c := client(f, spdk.Options{Socket: socket, Deadline: 10 * time.Second})
	f.Fuzz(func(t *testing.T, in []byte) {
		answers <- in
		var list []spdk.Bdev
		err := c.Call(t.Context(), "m", nil, &list)
		if err == nil && len(in) == 0 {
			t.Fatal("an answer out of nothing")
		}
		for i := range list {
			list[i].SizeBytes()
		}
		v, err := c.GetVersion(t.Context())
		if err != nil || v.Version != "sound" {
			t.Fatalf("afterwards: %+v %v", v, err)
		}
	})
}
