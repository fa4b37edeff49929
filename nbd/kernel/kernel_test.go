package kernel

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io/fs"
	"net"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/mdlayher/netlink"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nbd"
	server "github.com/thaw-project/thaw/target/nbd"
)

// The attributes are compared byte for byte with what struct nlattr prescribes: length
// with header, type (0x8000 marks a nested one), data padded to 4.
func TestEncodeConnect(t *testing.T) {
	c := Config{SizeBytes: 1 << 20, BlockBytes: 512, Timeout: 1500 * time.Millisecond, DeadConnTimeout: time.Minute,
		ServerFlags: nbd.FlagHasFlags | nbd.FlagReadOnly, ClientFlags: DisconnectOnClose, Sockets: []int{7, 8}, Backend: "abcde"}
	got, err := c.encode(nil)
	if err != nil {
		t.Fatal(err)
	}
	want, _ := hex.DecodeString(strings.ReplaceAll(
		"0c000200 0000100000000000"+ // size
			"0c000300 0002000000000000"+ // block size
			"0c000500 0300000000000000"+ // server flags
			"0c000400 0200000000000000"+ // timeout, rounded up
			"0c000800 3c00000000000000"+ // dead connection timeout
			"0c000600 0200000000000000"+ // client flags
			"0a000a00 616263646500 0000"+ // backend, with its NUL and padding
			"1c000780 0c000180 08000100 07000000 0c000180 08000100 08000000", " ", ""))
	if !bytes.Equal(got, want) {
		t.Errorf("got  %x\nwant %x", got, want)
	}
	index := uint32(3)
	again, err := (&Config{Sockets: []int{1}}).encode(&index)
	if err != nil || !bytes.HasPrefix(again, []byte{8, 0, 1, 0, 3, 0, 0, 0}) || bytes.Contains(again, []byte{0x0c, 0, 2, 0}) {
		t.Errorf("reconfigure: %x, %v: must name the device and not its size", again, err)
	}
}

func TestEncodeRefuses(t *testing.T) {
	good := Config{SizeBytes: 4096, BlockBytes: 512, Sockets: []int{1}}
	for name, change := range map[string]func(*Config){
		"no socket":      func(c *Config) { c.Sockets = nil },
		"many sockets":   func(c *Config) { c.Sockets = make([]int, maxSockets+1) },
		"no size":        func(c *Config) { c.SizeBytes = 0 },
		"half a block":   func(c *Config) { c.SizeBytes = 700 },
		"odd blocks":     func(c *Config) { c.BlockBytes = 513 },
		"small blocks":   func(c *Config) { c.BlockBytes = 256 },
		"long backend":   func(c *Config) { c.Backend = strings.Repeat("x", MaxBackendBytes+1) },
		"negative times": func(c *Config) { c.Timeout = -1 },
	} {
		c := good
		change(&c)
		if _, err := c.encode(nil); !errors.Is(err, kind.Invalid) {
			t.Errorf("%s: %v, want %v", name, err, kind.Invalid)
		}
	}
	if _, err := good.encode(nil); err != nil {
		t.Error(err)
	}
}

func statusReply(devices ...Status) []byte {
	e := netlink.NewAttributeEncoder()
	e.Nested(attrDeviceList, func(list *netlink.AttributeEncoder) error {
		for _, d := range devices {
			list.Nested(deviceItem, func(item *netlink.AttributeEncoder) error {
				item.Uint32(deviceIndex, d.Index)
				connected := uint8(0)
				if d.Connected {
					connected = 1
				}
				item.Uint8(deviceConnected, connected)
				return nil
			})
		}
		return nil
	})
	b, _ := e.Encode()
	return b
}

func TestDecode(t *testing.T) {
	want := []Status{{0, true}, {15, false}}
	got, err := decodeStatus(statusReply(want...))
	if err != nil || len(got) != 2 || got[0] != want[0] || got[1] != want[1] {
		t.Errorf("%+v, %v", got, err)
	}
	raw, _ := encodeIndex(77)
	if index, err := decodeIndex(raw); err != nil || index != 77 {
		t.Errorf("%d, %v", index, err)
	}
	for _, bad := range [][]byte{nil, {1}, {8, 0, 1, 0, 1, 0}, {4, 0, 1, 0}, {0xff, 0xff, 1, 0}} {
		if _, err := decodeIndex(bad); err == nil {
			t.Errorf("%x gives an index", bad)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(statusReply(Status{1, true}, Status{2, false}))
	f.Add([]byte{8, 0, 1, 0, 1, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		list, _ := decodeStatus(b)
		if len(list) > len(b) {
			t.Errorf("%d devices in %d bytes", len(list), len(b))
		}
		decodeIndex(b)
	})
}

func TestDevices(t *testing.T) {
	file := func(s string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(s)} }
	sys := fstest.MapFS{
		"block/nbd0/size": file("0\n"), "block/nbd0/ro": file("0\n"),
		"block/nbd12/size": file("2048\n"), "block/nbd12/ro": file("1\n"), "block/nbd12/pid": file("1\n"), "block/nbd12/backend": file("thaw-x/y\n"),
		"block/nbd2/size": file("lots\n"),
		"block/nbd3/size": file("-8\n"),
		"block/nbd/size":  file("8\n"), "block/nbd12p1/size": file("8\n"), "block/nbd+1/size": file("8\n"),
		"block/nbd99999999/size": file("8\n"), "block/loop0/size": file("8\n"),
	}
	got, err := Devices(sys)
	want := []Device{{Index: 0}, {Index: 12, Connected: true, Backend: "thaw-x/y", SizeBytes: 1 << 20, ReadOnly: true}}
	if err != nil || len(got) != 2 || got[0] != want[0] || got[1] != want[1] {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := Look(sys, 5); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a device that is not there: %v", err)
	}
	if Path(12) != "/dev/nbd12" {
		t.Error(Path(12))
	}
}

func FuzzDevices(f *testing.F) {
	f.Add("nbd1", "8\n", "1\n", "b\n")
	f.Fuzz(func(t *testing.T, name, size, ro, backend string) {
		if !fs.ValidPath(name) || strings.Contains(name, "/") || name == "." {
			return
		}
		dir := "block/" + name + "/"
		sys := fstest.MapFS{dir + "size": {Data: []byte(size)}, dir + "ro": {Data: []byte(ro)}, dir + "backend": {Data: []byte(backend)}}
		list, err := Devices(sys)
		for _, d := range list {
			if d.SizeBytes < 0 {
				t.Errorf("%+v, %v", d, err)
			}
		}
	})
}

type memory struct{ sizeBytes int64 }

func (m memory) ReadAt(p []byte, off int64) (int, error) {
	for i := range p {
		p[i] = byte((off + int64(i)) >> 9)
	}
	return len(p), nil
}
func (memory) WriteAt([]byte, int64) (int, error) { return 0, kind.Errorf(kind.ReadOnly, "write") }
func (memory) Flush() error                       { return nil }
func (memory) Discard(int64, int64) error         { return kind.Errorf(kind.ReadOnly, "discard") }
func (memory) WriteZeroes(int64, int64) error     { return kind.Errorf(kind.ReadOnly, "write") }
func (m memory) SizeBytes() int64                 { return m.sizeBytes }
func (memory) ReadOnly() bool                     { return true }
func (memory) Close() error                       { return nil }

// TestNegotiate speaks with our own server, then reads a block as the kernel would.
func TestNegotiate(t *testing.T) {
	s := server.New(server.Config{})
	defer s.Shutdown(context.Background())
	if err := s.AddExport(server.Export{Name: "disk", Device: memory{1 << 20}}); err != nil {
		t.Fatal(err)
	}
	dialServer := func() net.Conn {
		a, b := net.Pipe()
		s.Handle(a)
		b.SetDeadline(time.Now().Add(time.Minute))
		return b
	}
	conn := dialServer()
	e, err := Negotiate(conn, "disk")
	if err != nil || e.SizeBytes != 1<<20 || e.Flags&nbd.FlagReadOnly == 0 || e.Flags&nbd.FlagCanMultiConn == 0 {
		t.Fatalf("%+v, %v", e, err)
	}
	request := binary.BigEndian.AppendUint32(nil, nbd.MagicRequest)
	request = binary.BigEndian.AppendUint32(request, nbd.CmdRead)
	request = binary.BigEndian.AppendUint64(request, 42)
	request = binary.BigEndian.AppendUint64(request, 512)
	request = binary.BigEndian.AppendUint32(request, 4)
	if _, err := conn.Write(request); err != nil {
		t.Fatal(err)
	}
	want := binary.BigEndian.AppendUint32(nil, nbd.MagicSimpleReply)
	want = binary.BigEndian.AppendUint64(want, 42<<0)
	want = append(want[:4:4], append(make([]byte, 4), want[4:]...)...)
	want = append(want, 1, 1, 1, 1)
	got := make([]byte, len(want))
	if n, err := conn.Read(got); err != nil || !bytes.Equal(got[:n], want[:n]) {
		t.Fatalf("got %x, %v; want %x", got, err, want)
	}
	conn.Close()
	conn = dialServer()
	if _, err := Negotiate(conn, "none"); !errors.Is(err, kind.NotFound) {
		t.Errorf("an unknown export: %v", err)
	}
	conn.Close()
}

// canned is a peer that says the same whatever it hears.
type canned struct{ *bytes.Reader }

func (canned) Write(p []byte) (int, error) { return len(p), nil }

func FuzzNegotiate(f *testing.F) {
	hello := binary.BigEndian.AppendUint64(nil, nbd.MagicServer)
	hello = binary.BigEndian.AppendUint64(hello, nbd.MagicOption)
	hello = binary.BigEndian.AppendUint16(hello, nbd.HandshakeFixedNewstyle)
	info := binary.BigEndian.AppendUint64([]byte{0, nbd.InfoExport}, 4096)
	info = binary.BigEndian.AppendUint16(info, nbd.FlagHasFlags)
	good := nbd.AppendOptionReply(hello, nbd.OptGo, nbd.RepInfo, info)
	good = nbd.AppendOptionReply(good, nbd.OptGo, nbd.RepAck, nil)
	f.Add(good)
	f.Add(nbd.AppendOptionReply(hello, nbd.OptGo, nbd.RepErrUnknown, nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := Negotiate(canned{bytes.NewReader(b)}, "x")
		if err == nil && e.SizeBytes < 0 {
			t.Errorf("size %d", e.SizeBytes)
		}
	})
	if e, err := Negotiate(canned{bytes.NewReader(good)}, "x"); err != nil || e.SizeBytes != 4096 {
		f.Errorf("%+v, %v", e, err)
	}
}

func TestProbeSaysWhatIsMissing(t *testing.T) {
	err := Probe()
	t.Logf("probe: %v", err)
	if err != nil && kind.Of(err) != kind.Unsupported && kind.Of(err) != kind.Denied {
		t.Errorf("%v has kind %q", err, kind.Of(err))
	}
}
