package fabrics

import (
	"errors"
	"io/fs"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present/nvmesys"
)

func goodExport() Export {
	return Export{Subsystem: testSubsystem, HostNQN: testHost, HostID: testHostID, Portals: []Portal{{TransportTCP, "10.0.2.2", "4420"}}, NSID: 1,
		UUID: "11111111-2222-4333-8444-555555555555", SizeBytes: 4096}
}

func TestOptions(t *testing.T) {
	var timeouts Timeouts
	if err := timeouts.ensureDefaults(); err != nil {
		t.Fatal(err)
	}
	s := settings{timeouts, 3, true, true}
	e := goodExport()
	const common = ",traddr=10.0.2.2,trsvcid=4420,nqn=" + testSubsystem + ",hostnqn=" + testHost + ",hostid=" + testHostID +
		",nr_io_queues=3,ctrl_loss_tmo=1800,fast_io_fail_tmo=600,keep_alive_tmo=10,reconnect_delay=2"
	if got, want := s.options(&e, e.Portals[0]), "transport=tcp"+common+",hdr_digest,data_digest"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	e.Portals[0].Transport = TransportRDMA
	if got, want := s.options(&e, e.Portals[0]), "transport=rdma"+common; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	short := Timeouts{ControllerLoss: 1500 * time.Millisecond}
	if err := short.ensureDefaults(); err != nil || short.FastIOFail > short.ControllerLoss {
		t.Errorf("%+v, %v", short, err)
	}
	if got := (&settings{Timeouts: short}).options(&e, e.Portals[0]); !strings.Contains(got, "ctrl_loss_tmo=2,fast_io_fail_tmo=2,") {
		t.Error(got)
	}
	for _, bad := range []Timeouts{{FastIOFail: time.Hour, ControllerLoss: time.Minute}, {KeepAlive: time.Millisecond}, {ReconnectDelay: -1}} {
		if err := bad.ensureDefaults(); !errors.Is(err, kind.Invalid) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}

func TestExportsAreChecked(t *testing.T) {
	good := goodExport()
	if err := good.validate(); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Export){
		"option in NQN":   func(e *Export) { e.Subsystem += ",hostnqn=x" },
		"newline in NQN":  func(e *Export) { e.HostNQN += "\n" },
		"no NQN":          func(e *Export) { e.Subsystem = "subsystem" },
		"long NQN":        func(e *Export) { e.HostNQN += strings.Repeat("x", 223) },
		"host identifier": func(e *Export) { e.HostID = "{" + testHostID + "}" },
		"no UUID":         func(e *Export) { e.UUID = "" },
		"zero UUID":       func(e *Export) { e.UUID = "00000000-0000-0000-0000-000000000000" },
		"size":            func(e *Export) { e.SizeBytes = 1000 },
		"no portal":       func(e *Export) { e.Portals = nil },
		"many portals":    func(e *Export) { e.Portals = make([]Portal, 9) },
		"transport":       func(e *Export) { e.Portals = []Portal{{"fc", "10.0.0.1", "1"}} },
		"address":         func(e *Export) { e.Portals = []Portal{{"tcp", "example.org", "1"}} },
		"zone":            func(e *Export) { e.Portals = []Portal{{"tcp", "fe80::1%a,b", "1"}} },
		"service":         func(e *Export) { e.Portals = []Portal{{"tcp", "10.0.0.1", "1,x"}} },
		"port":            func(e *Export) { e.Portals = []Portal{{"tcp", "10.0.0.1", "65536"}} },
	} {
		e := goodExport()
		change(&e)
		if err := e.validate(); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzOptions(f *testing.F) {
	f.Add(testSubsystem, testHost, "10.0.0.1", "4420")
	f.Fuzz(func(t *testing.T, subsystem, host, address, service string) {
		e := goodExport()
		e.Subsystem, e.HostNQN, e.Portals = subsystem, host, []Portal{{TransportTCP, address, service}}
		if e.validate() != nil {
			return
		}
		s := settings{ioQueues: 1}
		if o := s.options(&e, e.Portals[0]); strings.Count(o, ",") != 10 || strings.ContainsAny(o, "\n\x00 ") {
			t.Errorf("%q", o)
		}
	})
}

func TestReply(t *testing.T) {
	for reply, ok := range map[string]bool{"instance=0,cntlid=1\n": true, "cntlid=7,instance=12": true, "": false, "instance=": false, "instance=-1": false, "x": false} {
		if err := parseReply(reply); (err == nil) != ok {
			t.Errorf("%q: %v", reply, err)
		}
	}
}

// tree is what a guest with native multipath shows, cut down to what is read.
func tree() fstest.MapFS {
	file := func(s string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(s)} }
	return fstest.MapFS{
		"class/nvme/nvme0/subsysnqn": file(testSubsystem + "\n"), "class/nvme/nvme0/hostnqn": file(testHost + "\n"), "class/nvme/nvme0/transport": file("tcp\n"),
		"class/nvme/nvme0/address": file("traddr=10.0.2.2,trsvcid=4420,src_addr=10.0.2.15\n"), "class/nvme/nvme0/state": file("live\n"),
		"class/nvme/nvme1/subsysnqn": file(testSubsystem + "\n"), "class/nvme/nvme1/hostnqn": file(testHost + "\n"), "class/nvme/nvme1/transport": file("rdma\n"),
		"class/nvme/nvme1/address": file("traddr=fe80::1,trsvcid=4421\n"), "class/nvme/nvme1/state": file("deleting\n"),
		"class/nvme/nvme2/subsysnqn": file("nqn.2014.08.org.nvmexpress:pcie\n"), "class/nvme/nvme2/transport": file("pcie\n"), "class/nvme/nvme2/address": file("0000:00:05.0\n"),
		"class/nvme/nvme3/state": file("new\n"), // half made
		"block/nvme0n1/size":     file("2048\n"), "block/nvme0n1/ro": file("1\n"), "block/nvme0n1/wwid": file("uuid.11111111-2222-4333-8444-55555555555A\n"), "block/nvme0n1/device/subsysnqn": file(testSubsystem + "\n"),
		"block/nvme0c0n1/size": file("2048\n"), "block/nvme0c0n1/wwid": file("uuid.11111111-2222-4333-8444-55555555555a\n"), "block/nvme0c0n1/device/subsysnqn": file(testSubsystem + "\n"),
		"block/nvme0n2/size": file("8\n"), "block/nvme0n2/wwid": file("eui.0011\n"), "block/nvme0n2/uuid": file("22222222-2222-4333-8444-555555555555\n"), "block/nvme0n2/device/subsysnqn": file(testSubsystem + "\n"),
		"block/nvme0n3/size": file("nonsense\n"), "block/nvme0n3/device/subsysnqn": file(testSubsystem + "\n"),
		"block/nvme0n4/size": file("8\n"), "block/nvme0n4/wwid": file("nvme.1b36-00\n"), "block/nvme0n4/device/subsysnqn": file(testSubsystem + "\n"),
		"block/nvme2n1/size": file("8\n"), "block/nvme2n1/wwid": file("uuid.11111111-2222-4333-8444-55555555555a\n"), "block/nvme2n1/device/subsysnqn": file("another\n"),
		"block/sda/size": file("8\n"),
	}
}

func TestSysfs(t *testing.T) {
	ctrls, err := controllers(tree())
	if err != nil || len(ctrls) != 2 {
		t.Fatalf("%+v, %v", ctrls, err)
	}
	if c := ctrls[0]; c.Name != "nvme0" || !c.of(testSubsystem, testHost) || c.Portal != (Portal{"tcp", "10.0.2.2", "4420"}) || !c.usable() {
		t.Errorf("%+v", c)
	}
	if c := ctrls[1]; c.Portal != (Portal{"rdma", "fe80::1", "4421"}) || c.usable() {
		t.Errorf("%+v", c)
	}
	list, err := drives(tree(), testSubsystem)
	if err != nil || len(list) != 2 {
		t.Fatalf("%+v, %v", list, err)
	}
	if want := (drive{"nvme0n1", "11111111-2222-4333-8444-55555555555a", testSubsystem, 1 << 20, true}); list[0] != want {
		t.Errorf("%+v, want %+v", list[0], want)
	}
	if list[1].UUID != "22222222-2222-4333-8444-555555555555" || list[1].ReadOnly {
		t.Errorf("%+v", list[1])
	}
	// A kernel without NVMe.
	empty := fstest.MapFS{"block/sda/size": {Data: []byte("8")}}
	if ctrls, err := controllers(empty); err != nil || len(ctrls) != 0 {
		t.Errorf("%+v, %v", ctrls, err)
	}
}

func FuzzSysfs(f *testing.F) {
	f.Add("nvme0", "traddr=1,trsvcid=2", "nvme0n1", "8", "uuid.x")
	f.Fuzz(func(t *testing.T, ctrl, address, block, size, wwid string) {
		for _, name := range []string{ctrl, block} {
			if !fs.ValidPath(name) || strings.Contains(name, "/") || name == "." {
				return
			}
		}
		sys := fstest.MapFS{
			"class/nvme/" + ctrl + "/subsysnqn": {Data: []byte("nqn.x")}, "class/nvme/" + ctrl + "/transport": {Data: []byte("tcp")}, "class/nvme/" + ctrl + "/address": {Data: []byte(address)},
			"block/" + block + "/size": {Data: []byte(size)}, "block/" + block + "/wwid": {Data: []byte(wwid)}, "block/" + block + "/device/subsysnqn": {Data: []byte("nqn.x")},
		}
		controllers(sys)
		list, _ := drives(sys, "nqn.x")
		for _, d := range list {
			if d.SizeBytes < 0 || !nvmesys.IsDrive(d.Name) {
				t.Errorf("%+v", d)
			}
		}
	})
}
