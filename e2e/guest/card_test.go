package guest_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/thaw-project/thaw/e2e/guest"
)

// cardFunctions is how many PCIe functions the card that QEMU plays has.
const cardFunctions = 12

// simulatedCard is a DPU's control chain on this machine, with QEMU's root ports for its
// PCIe functions: thaw target and thaw bridge, each a process of its own.
type simulatedCard struct {
	dir, program, qmp string
	target, bridge    *daemon
	daemons           []*daemon // in the order in which they were started
	conn              *grpc.ClientConn
}

// daemon is a thaw process that a test kills and starts again.
type daemon struct {
	program string
	args    []string
	log     string
	command *exec.Cmd // nil before the first start
}

func (d *daemon) start(t *testing.T) {
	t.Helper()
	log, err := os.OpenFile(d.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	d.command = exec.Command(d.program, d.args...)
	d.command.Stdout, d.command.Stderr = log, log
	if err := d.command.Start(); err != nil {
		t.Fatal(err)
	}
}

// kill ends the process as a crash would; again is harmless.
func (d *daemon) kill() {
	if d.command != nil && d.command.ProcessState == nil {
		_ = unix.Kill(d.command.Process.Pid, unix.SIGKILL)
		_ = d.command.Wait() // the signal
	}
}

// rootPorts are QEMU's arguments for a machine whose functions a card can plug.
func rootPorts(qmp string) []string {
	args := []string{"-qmp", "unix:" + qmp + ",server=on,wait=off"}
	for i := range cardFunctions {
		args = append(args, "-device", fmt.Sprintf("pcie-root-port,id=rp%d,chassis=%d,slot=%d", i, i+1, i))
	}
	return args
}

var qemuLine = regexp.MustCompile(`msg="function plugged".* qemu_took=(\S+)`)

// qemuTook is how long a bridge waited for QEMU's answers when it last plugged a function.
func qemuTook(t *testing.T, log string) time.Duration {
	t.Helper()
	raw, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	lines := qemuLine.FindAllSubmatch(raw, -1)
	if len(lines) == 0 {
		t.Fatalf("the bridge has plugged nothing:\n%s", raw)
	}
	took, err := time.ParseDuration(string(lines[len(lines)-1][1]))
	if err != nil {
		t.Fatal(err)
	}
	return took
}

// newCard starts a card's target and bridge. Its functions work once a guest runs with
// rootPorts(c.qmp).
func newCard(t *testing.T, program string) *simulatedCard {
	t.Helper()
	dir, err := os.MkdirTemp("", "thaw-card-") // short: the paths of sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	at := func(name string) string { return filepath.Join(dir, name) }
	c := &simulatedCard{dir: dir, program: program, qmp: at("qmp")}
	c.target = &daemon{program: program, log: at("target.log"), args: []string{"target", "--root", at("t"), "--socket", at("target"), "--persist"}}
	c.bridge = &daemon{program: program, log: at("bridge.log"), args: []string{"bridge", "--target", at("target"), "--socket", at("bridge"),
		"--dpu-sim", c.qmp, "--dpu-sim-functions", fmt.Sprint(cardFunctions), "--dpu-sim-sockets", at("s")}}
	if c.conn, err = grpc.NewClient("unix:"+at("bridge"), grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.conn.Close()
		for _, d := range slices.Backward(c.daemons) {
			d.kill()
			if log, err := os.ReadFile(d.log); t.Failed() && err == nil {
				t.Logf("thaw %s:\n%s", d.args[0], log[max(0, len(log)-6000):])
			}
		}
	})
	c.start(t, c.target)
	c.start(t, c.bridge)
	return c
}

// start starts a process that ends with the test.
func (c *simulatedCard) start(t *testing.T, d *daemon) {
	t.Helper()
	d.start(t)
	c.daemons = append(c.daemons, d)
}

// shownDisk is a disk that OPI's calls make a drive of.
type shownDisk struct {
	name, nqn, serial, uuid string
	function                int
	content                 []byte
}

func (d *shownDisk) sum() string { return fmt.Sprintf("%x", sha256.Sum256(d.content)) }

func (d *shownDisk) drive(more string) string {
	return fmt.Sprintf("/host/drive -uuid %s -serial %s -function 0:%d:0 %s", d.uuid, d.serial, d.function, more)
}

// newDisk makes a volume with content.
func (c *simulatedCard) newDisk(t *testing.T, name string, function int) *shownDisk {
	t.Helper()
	d := &shownDisk{name: name, nqn: "nqn.2014-08.org.thaw-project:card-test:" + name, serial: "SN" + name, function: function,
		uuid: fmt.Sprintf("%08x-1111-4222-8333-444444444444", function+1), content: make([]byte, 16<<20)}
	_, _ = rand.NewChaCha8(sha256.Sum256([]byte(name))).Read(d.content) // never fails
	path := filepath.Join(c.dir, "disk-"+name)
	if err := os.WriteFile(path, d.content, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := opiv1.NewAioVolumeServiceClient(c.conn).CreateAioVolume(t.Context(), &opiv1.CreateAioVolumeRequest{AioVolumeId: name,
		AioVolume: &opiv1.AioVolume{Filename: path, BlockSize: 512}}, grpc.WaitForReady(true))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// show makes the drive, and returns how long each call took.
func (c *simulatedCard) show(t *testing.T, d *shownDisk) string {
	t.Helper()
	fe, ctx := opiv1.NewFrontendNvmeServiceClient(c.conn), t.Context()
	sub := "nvmeSubsystems/" + d.nqn
	var took []string
	step := func(what string, f func() error) {
		t.Helper()
		began := time.Now()
		if err := f(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		took = append(took, fmt.Sprintf("%s %.1f ms", what, float64(time.Since(began).Microseconds())/1e3))
	}
	step("subsystem", func() error {
		_, err := fe.CreateNvmeSubsystem(ctx, &opiv1.CreateNvmeSubsystemRequest{NvmeSubsystem: &opiv1.NvmeSubsystem{
			Spec: &opiv1.NvmeSubsystemSpec{Nqn: d.nqn, SerialNumber: d.serial, Hostnqn: guest.HostNQN}}}, grpc.WaitForReady(true))
		return err
	})
	step("nvmeNamespace", func() error {
		_, err := fe.CreateNvmeNamespace(ctx, &opiv1.CreateNvmeNamespaceRequest{Parent: sub, NvmeNamespace: &opiv1.NvmeNamespace{
			Spec: &opiv1.NvmeNamespaceSpec{VolumeNameRef: "aioVolumes/" + d.name, Uuid: d.uuid}}})
		return err
	})
	step("function", func() error { return c.plug(t, d) })
	return strings.Join(took, ", ")
}

func (c *simulatedCard) plug(t *testing.T, d *shownDisk) error {
	_, err := opiv1.NewFrontendNvmeServiceClient(c.conn).CreateNvmeController(t.Context(), &opiv1.CreateNvmeControllerRequest{Parent: "nvmeSubsystems/" + d.nqn,
		NvmeController: &opiv1.NvmeController{Spec: &opiv1.NvmeControllerSpec{Trtype: opiv1.NvmeTransportType_NVME_TRANSPORT_TYPE_PCIE,
			Endpoint: &opiv1.NvmeControllerSpec_PcieId{PcieId: &opiv1.PciEndpoint{
				PortId: wrapperspb.Int32(0), PhysicalFunction: wrapperspb.Int32(int32(d.function)), VirtualFunction: wrapperspb.Int32(0)}}}}}, grpc.WaitForReady(true))
	return err
}

func (c *simulatedCard) unplug(t *testing.T, d *shownDisk) {
	t.Helper()
	_, err := opiv1.NewFrontendNvmeServiceClient(c.conn).DeleteNvmeController(t.Context(), &opiv1.DeleteNvmeControllerRequest{
		Name: fmt.Sprintf("nvmeSubsystems/%s/nvmeControllers/pcie:0:%d:0", d.nqn, d.function)}, grpc.WaitForReady(true))
	if err != nil {
		t.Fatal(err)
	}
}

// TestCard shows drives to the guest by OPI's calls, with nothing in between but a
// target, a bridge and QEMU.
func TestCard(t *testing.T) {
	guest.Require(t)
	c := newCard(t, guest.Build(t, "cmd/thaw"))
	// A drive that was there when the machine started has its nvmeNamespace's UUID; QEMU
	// cannot plug one that has.
	cold := &shownDisk{name: "cold", serial: "COLD", uuid: "aaaaaaaa-1111-4222-8333-444444444444", content: bytes.Repeat([]byte("cold"), 1<<18)}
	coldPath := filepath.Join(c.dir, "cold")
	if err := os.WriteFile(coldPath, cold.content, 0o600); err != nil {
		t.Fatal(err)
	}
	args := append(rootPorts(c.qmp), "-drive", "if=none,id=cold,format=raw,readonly=on,file="+coldPath,
		"-device", "nvme,id=coldctl,serial=OTHER", "-device", "nvme-ns,drive=cold,bus=coldctl,uuid="+cold.uuid)
	g := guest.New(t, guest.Options{Modules: []string{"nvme", "ext4"}, Args: args, Files: map[string]string{"drive": guest.Build(t, "e2e/guest/drive")}})
	find := func(t *testing.T, d *shownDisk, more string) (path string) {
		t.Helper()
		out := strings.Fields(g.Must(t, d.drive(more)))
		t.Logf("the node finds %s as %s in %s ms", d.name, out[0], out[1])
		return out[0]
	}
	wantContent := func(t *testing.T, d *shownDisk, path string) {
		t.Helper()
		if out := g.Must(t, "echo 3 >/proc/sys/vm/drop_caches; sha256sum <"+path); !strings.HasPrefix(out, d.sum()) {
			t.Errorf("%s is not what was shown: %s", path, out)
		}
	}
	gone := func(t *testing.T, d *shownDisk) {
		t.Helper()
		g.Must(t, "await '! grep -qx \""+d.serial+" *\" /sys/class/nvme/nvme*/serial 2>/dev/null'")
	}

	t.Run("cold-plugged, by UUID", func(t *testing.T) {
		// Linux does not believe what QEMU's controller says of its nvmeNamespaces
		// (NVME_QUIRK_BOGUS_NID), unless it is told to treat it as any other.
		g.Must(t, `cd /sys/bus/pci/drivers/nvme
			a=$(basename $(readlink -f /sys/class/nvme/nvme0/device))
			echo 1b36 0010 ffffffff ffffffff 010802 ffffff 0 >new_id
			echo $a >unbind; echo $a >bind; echo 1b36 0010 >remove_id`)
		wantContent(t, cold, find(t, cold, ""))
		if out := g.Must(t, "cat /sys/block/nvme*n1/uuid"); strings.TrimSpace(out) != cold.uuid {
			t.Errorf("the kernel shows the UUID %s", out)
		}
	})

	d := c.newDisk(t, "a", 1)
	t.Run("plugged", func(t *testing.T) {
		// The kernel is waited for from before the call, so that what it takes is seen.
		seen, err := g.Start(t.Context(), `until [ -b /dev/nvme1n1 ]; do sleep 0.005; done; echo seen; udevadm info /dev/nvme1n1 2>/dev/null | head -n 3 || true`, nil)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second) // the shell has begun
		began := time.Now()
		steps := c.show(t, d)
		called := time.Since(began)
		for !strings.Contains(seen.Output(), "seen") {
			select {
			case <-seen.Done():
			case <-time.After(time.Millisecond):
			}
			if time.Since(began) > time.Minute {
				t.Fatalf("the kernel shows no drive: %s", seen.Output())
			}
		}
		all := time.Since(began)
		emulator := qemuTook(t, c.bridge.log)
		t.Logf("from call to /dev/nvme1n1 %d ms: ours %d ms, QEMU's monitor %d ms (our calls: %s), the emulated kernel %d ms",
			all.Milliseconds(), (called - emulator).Milliseconds(), emulator.Milliseconds(), steps, (all - called).Milliseconds())
		wantContent(t, d, find(t, d, "-writable"))
	})
	t.Run("written", func(t *testing.T) {
		path := find(t, d, "-writable")
		g.Must(t, fmt.Sprintf("head -c 1M /dev/zero | tr '\\0' x | dd of=%s bs=64k seek=16 conv=fsync oflag=direct iflag=fullblock 2>&1", path))
		copy(d.content[1<<20:], bytes.Repeat([]byte{'x'}, 1<<20))
		wantContent(t, d, path)
		if on, err := os.ReadFile(filepath.Join(c.dir, "disk-a")); err != nil || !bytes.Equal(on, d.content) {
			t.Errorf("what the host wrote is not on the card's disk: %v", err)
		}
	})
	t.Run("killed", func(t *testing.T) {
		path := find(t, d, "-writable")
		reader, err := g.Start(t.Context(), fmt.Sprintf("set -e; while [ ! -e /tmp/enough ]; do dd if=%s of=/tmp/read bs=256k iflag=direct status=none; sha256sum </tmp/read >>/tmp/sums; done", path), nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, victim := range []*daemon{c.target, c.bridge} {
			n := len(strings.Fields(g.Must(t, "cat /tmp/sums 2>/dev/null || true")))
			victim.kill()
			time.Sleep(3 * time.Second)
			victim.start(t)
			began := time.Now()
			g.Must(t, fmt.Sprintf("await '[ $(wc -l </tmp/sums) -ge %d ]'", n/2+3))
			t.Logf("thaw %s was away for 3 s: the host read on within %s", victim.args[0], time.Since(began).Round(time.Millisecond))
		}
		g.Must(t, "touch /tmp/enough")
		if code, err := reader.Wait(t.Context()); err != nil || code != 0 {
			t.Errorf("the reader: status %d, %v: %s", code, err, reader.Output())
		}
		if out := g.Must(t, "sort /tmp/sums | uniq -c"); strings.Count(out, "\n") != 1 || !strings.Contains(out, d.sum()) {
			t.Errorf("the host read\n%s", out)
		}
		g.Must(t, "! dmesg | grep -E 'I/O error|nvme.*(timeout|reset)'")
		// The bridge knows without having kept anything.
		if err := c.plug(t, d); err != nil {
			t.Error(err)
		}
	})
	t.Run("without a driver", func(t *testing.T) {
		e := c.newDisk(t, "b", 2)
		c.show(t, e)
		// The kernel binds what is plugged, whatever drivers_autoprobe says.
		address := strings.TrimSpace(g.Must(t, `
			controller() { grep -lx "`+e.serial+` *" /sys/class/nvme/nvme*/serial 2>/dev/null; }
			await '[ -n "$(controller)" ]'
			f=$(controller)
			await '[ "$(cat ${f%/serial}/state)" = live ]'
			a=$(cat ${f%/serial}/address)
			echo $a >/sys/bus/pci/drivers/nvme/unbind
			echo $a`))
		if out, code, err := g.Run(t.Context(), e.drive("-timeout 3s")); err != nil || code == 0 {
			t.Errorf("found without a driver: %d %v %s", code, err, out)
		}
		path := find(t, e, "-address "+address)
		wantContent(t, e, path)
		if out, code, err := g.Run(t.Context(), "exec 3<"+path+"; "+e.drive("-leave -address "+address)); err != nil || code == 0 {
			t.Errorf("a drive in use was left: %d %v %s", code, err, out)
		}
		g.Must(t, e.drive("-leave -address "+address))
		g.Must(t, "[ ! -e /sys/bus/pci/devices/"+address+"/driver ]")
		c.unplug(t, e)
		g.Must(t, "await '[ ! -e /sys/bus/pci/devices/"+address+" ]'")
	})
	t.Run("unplugged", func(t *testing.T) {
		began := time.Now()
		c.unplug(t, d)
		t.Logf("unplugged in %s", time.Since(began).Round(time.Millisecond))
		gone(t, d)
		for range 3 {
			if err := c.plug(t, d); err != nil {
				t.Fatal(err)
			}
			find(t, d, "-writable")
			c.unplug(t, d)
			gone(t, d)
		}
		if left, err := os.ReadDir(filepath.Join(c.dir, "s")); err != nil || len(left) != 0 {
			t.Errorf("left: %v %v", left, err)
		}
	})
}
