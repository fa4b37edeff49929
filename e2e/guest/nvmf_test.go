package guest_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/thaw-project/thaw/e2e/guest"
	"github.com/thaw-project/thaw/target/nvmf"
)

// TestTargetByLinux drives our target on this machine with Linux's host in the guest.
func TestTargetByLinux(t *testing.T) {
	g := guest.New(t, guest.Options{Modules: []string{"nvme-tcp", "ext4"}, CPUs: 2})
	store := newPool(t)
	defer store.Close()
	disk, err := store.OpenLvol("disk", false)
	if err != nil {
		t.Fatal(err)
	}
	target, address, err := newTarget(anyAddress)
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	first := uuid.New()
	if _, err := target.AddNvmeNamespace(subNQN, nvmf.NvmeNamespaceConfig{Device: disk, UUID: first}); err != nil {
		t.Fatal(err)
	}
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	connect := fmt.Sprintf("nvme connect -t tcp -a %s -s %s -n %s ", guest.HostAddress, port, subNQN)
	// The number of a controller is the kernel's choice.
	find := fmt.Sprintf("\nd=$(nvme_device %s); c=$(nvme_controller %s)\n", first, subNQN)
	disconnect := "nvme disconnect -n " + subNQN + "\nawait '! grep -q " + subNQN + " /sys/class/nvme/nvme*/subsysnqn 2>/dev/null'\n"

	t.Run("discover", func(t *testing.T) {
		var log struct {
			Records []struct{ Trtype, Traddr, Trsvcid, Subnqn, Subtype string }
		}
		out := g.Must(t, fmt.Sprintf("nvme discover -t tcp -a %s -s %s -o json", guest.HostAddress, port))
		if err := json.Unmarshal([]byte(out), &log); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if r := log.Records; len(r) != 1 || r[0].Trtype != "tcp" || r[0].Traddr != guest.HostAddress || r[0].Trsvcid != port || r[0].Subnqn != subNQN {
			t.Errorf("discovered %s", out)
		}
		// What discovery tells is enough to connect.
		g.Must(t, fmt.Sprintf("nvme connect-all -t tcp -a %s -s %s\n", guest.HostAddress, port)+find+disconnect)
	})
	t.Run("refused", func(t *testing.T) {
		const stranger = "-q nqn.2014-08.org.example:stranger -I 00000000-0000-4000-8000-0000000000bb"
		out, code, err := g.Run(t.Context(), "dmesg -C; "+connect+stranger+"; r=$?; dmesg; ls /dev/nvme*n*; exit $r")
		if err != nil {
			t.Fatal(err)
		}
		if code == 0 || !strings.Contains(out, "not allowed, hostnqn: nqn.2014-08.org.example:stranger") || strings.Contains(out, "\n/dev/nvme") {
			t.Errorf("a host that is not allowed: status %d\n%s", code, out)
		}
		out = g.Must(t, fmt.Sprintf("nvme discover -t tcp -a %s -s %s "+stranger, guest.HostAddress, port))
		if strings.Contains(out, subNQN) {
			t.Errorf("it discovers\n%s", out)
		}
	})
	t.Run("identify", func(t *testing.T) {
		g.Must(t, connect+find)
		var controller struct {
			Sn, Mn, Subnqn string
			Nn             int
			Cntrltype      int
		}
		out := g.Must(t, find+"nvme id-ctrl /dev/$c -o json")
		if err := json.Unmarshal([]byte(out), &controller); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if strings.TrimSpace(controller.Sn) != "GUEST1" || strings.TrimSpace(controller.Mn) != "Thaw guest test" || controller.Subnqn != subNQN || controller.Nn != nvmf.MaxNvmeNamespaces {
			t.Errorf("id-ctrl: %+v", controller)
		}
		var ns struct {
			Nsze  uint64
			Nguid string
			Lbafs []struct{ Ds int }
		}
		out = g.Must(t, find+"nvme id-ns $d -o json")
		if err := json.Unmarshal([]byte(out), &ns); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if ns.Nsze != lvolBytes/512 || ns.Nguid != strings.ReplaceAll(first.String(), "-", "") || len(ns.Lbafs) == 0 || ns.Lbafs[0].Ds != 9 {
			t.Errorf("id-ns: %s", out)
		}
		if out := g.Must(t, find+"nvme ns-descs /dev/$c -n 1"); !strings.Contains(out, first.String()) {
			t.Errorf("ns-descs: %s", out)
		}
		if out := g.Must(t, find+"blockdev --getsize64 $d"); out != fmt.Sprintf("%d\n", lvolBytes) {
			t.Errorf("size in the guest: %s", out)
		}
		if out := g.Must(t, find+"nvme list-ns /dev/$c"); !strings.Contains(out, ":0x1\n") {
			t.Errorf("list-ns: %s", out)
		}
		if out := g.Must(t, "nvme list"); !strings.Contains(out, "GUEST1") || !strings.Contains(out, "268.44  MB") {
			t.Errorf("list: %s", out)
		}
	})
	t.Run("logs", func(t *testing.T) {
		// A read far behind the end must fail, and be in the error log after.
		out := g.Must(t, find+"! nvme read $d -s 0x7fffffff -c 0 -z 512 2>&1; nvme error-log /dev/$c -e 4; nvme smart-log /dev/$c; nvme fw-log /dev/$c; nvme get-feature /dev/$c -f 7")
		for _, want := range []string{"LBA Out of Range", "error_count", "lba", "0x7fffffff", "critical_warning"} {
			if !strings.Contains(out, want) {
				t.Errorf("no %q in\n%s", want, out)
			}
		}
	})
	t.Run("ext4", func(t *testing.T) {
		out := g.Must(t, find+`mkfs.ext4 -q $d
			mount $d /mnt
			dd if=/dev/urandom of=/mnt/a bs=64k count=160 conv=fsync status=none
			cp /mnt/a /mnt/b; rm /mnt/a; mkdir /mnt/dir; cp -a /usr/sbin/ip /etc /mnt/dir
			fstrim -v /mnt
			sha256sum /mnt/b >/tmp/sum; umount /mnt
			e2fsck -f -n $d
			`+disconnect+connect+find+`
			mount $d /mnt; sha256sum -c /tmp/sum; cmp /mnt/dir/ip /usr/sbin/ip; umount /mnt
			nvme disconnect -n `+subNQN)
		if !strings.Contains(out, "/mnt/b: OK") || !strings.Contains(out, "trimmed") {
			t.Errorf("ext4:\n%s", out)
		}
	})
	t.Run("fio with digests", func(t *testing.T) {
		g.Must(t, connect+"--hdr-digest --data-digest --nr-io-queues=2 --nr-write-queues=2 --queue-size=64"+find)
		c := controllers(target)
		if len(c) != 1 || c[0].Queues != 4 {
			t.Errorf("controllers: %+v, want one with 4 I/O queues", c)
		}
		if out := g.Must(t, "dmesg | tail -20"); !strings.Contains(out, "mapped 2/2/0") {
			t.Errorf("kernel: %s", out)
		}
		out := g.MustWithin(t, 5*time.Minute, find+`fio --name=v --filename=$d --ioengine=libaio --direct=1 --rw=randwrite --bssplit=4k/60:512/10:32k/20:256k/10 \
			--iodepth=16 --numjobs=2 --size=16m --offset_increment=128m --fsync=200 --verify=crc32c --verify_fatal=1 --verify_state_save=0 2>&1`)
		if strings.Count(out, "err= 0") != 2 {
			t.Errorf("fio:\n%s", out)
		}
		t.Log(summary(out))
		g.Must(t, disconnect)
	})
	t.Run("nvmeNamespaces come and go", func(t *testing.T) {
		g.Must(t, connect+find)
		if _, err := store.Create("second", 64<<20); err != nil {
			t.Fatal(err)
		}
		extra, err := store.OpenLvol("second", false)
		if err != nil {
			t.Fatal(err)
		}
		for round := range 3 {
			id := uuid.New()
			nsid, err := target.AddNvmeNamespace(subNQN, nvmf.NvmeNamespaceConfig{Device: extra, UUID: id})
			if err != nil {
				t.Fatal(err)
			}
			out := g.Must(t, fmt.Sprintf(find+"d=$(nvme_device %s); blockdev --getsize64 $d; echo round %d | dd of=$d conv=fsync status=none; head -c 7 $d; cat /sys/class/nvme/$c/state", id, round))
			if out != fmt.Sprintf("%d\nround %dlive\n", 64<<20, round) {
				t.Errorf("round %d: %q", round, out)
			}
			if err := target.RemoveNvmeNamespace(subNQN, nsid); err != nil {
				t.Fatal(err)
			}
			g.Must(t, "await '! grep -q "+id.String()+" /sys/block/nvme*n*/uuid'")
		}
		// A device that grows.
		grown := uuid.New()
		if _, err := target.AddNvmeNamespace(subNQN, nvmf.NvmeNamespaceConfig{NSID: 9, Device: extra, UUID: grown}); err != nil {
			t.Fatal(err)
		}
		g.Must(t, "nvme_device "+grown.String())
		if _, err := store.Resize("second", 96<<20); err != nil {
			t.Fatal(err)
		}
		if err := target.ResizeNvmeNamespace(subNQN, 9); err != nil {
			t.Fatal(err)
		}
		g.Must(t, fmt.Sprintf("d=$(nvme_device %s); await '[ $(blockdev --getsize64 $d) = %d ]'", grown, 96<<20))
		if c := controllers(target); len(c) != 1 {
			t.Errorf("the host came again: %+v", c)
		}
		if err := target.RemoveNvmeNamespace(subNQN, 9); err != nil {
			t.Fatal(err)
		}
		g.Must(t, "await '! grep -q "+grown.String()+" /sys/block/nvme*n*/uuid'\n"+disconnect)
	})
	t.Run("no errors", func(t *testing.T) {
		out := g.Must(t, "dmesg")
		for line := range strings.Lines(out) {
			// What was asked for in vain above, and nothing else.
			if strings.Contains(line, "rror") && !strings.Contains(line, "0x7fffffff") {
				t.Error(line)
			}
		}
	})
	t.Run("host removed", func(t *testing.T) {
		g.Must(t, connect+find)
		if err := target.RemoveHost(subNQN, guest.HostNQN); err != nil {
			t.Fatal(err)
		}
		// The kernel tries again and is told never to.
		g.Must(t, "await '! grep -q "+subNQN+" /sys/class/nvme/nvme*/subsysnqn 2>/dev/null'")
		if c := controllers(target); len(c) != 0 {
			t.Errorf("controllers are left: %+v", c)
		}
	})
}

func controllers(target *nvmf.Target) []nvmf.ControllerInfo {
	return target.Subsystems()[0].Controllers
}

// summary is the lines of fio's output that say how fast it was.
func summary(out string) string {
	var lines []string
	for line := range strings.Lines(out) {
		if strings.Contains(line, "IOPS=") {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return strings.Join(lines, "\n")
}

// TestTargetKilled kills thaw target under an application's I/O and starts it again,
// which restores what it served. Nothing of it reaches the application.
func TestTargetKilled(t *testing.T) {
	guest.Require(t)
	target, port := startTarget(t)
	g := guest.New(t, guest.Options{Modules: []string{"nvme-tcp"}})
	// The kernel must send from threads of its own, as node/present/fabrics tells it to:
	// else fio gets SIGPIPE now and then. Two minutes is the loss timeout; a command
	// waits as long.
	g.Must(t, fmt.Sprintf("echo Y >/sys/module/nvme_tcp/parameters/wq_unbound; nvme connect -t tcp -a %s -s %s -n %s --ctrl-loss-tmo=120 --reconnect-delay=1 --keep-alive-tmo=5 -g -G", guest.HostAddress, port, subNQN))
	// It is the only controller, so its number is also that of its subsystem.
	find := "c=$(nvme_controller " + subNQN + "); await '[ -b /dev/${c}n1 ]'; d=/dev/${c}n1; stat=/sys/block/${c}n1/stat; state=/sys/class/nvme/$c/state\n"
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	fio, err := g.Start(ctx, find+`fio --name=v --filename=$d --ioengine=libaio --direct=1 --rw=randwrite --bs=4k --iodepth=8 --size=16m --rate_iops=150 \
		--fsync=50 --verify=crc32c --verify_fatal=1 --verify_state_save=0 2>&1`, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if t.Failed() {
			dmesg, _, err := g.Run(context.WithoutCancel(ctx), "dmesg | tail -60; "+find+"cat $stat $state; ps axo pid,stat,wchan:32,args | grep -v '\\['")
			t.Logf("fio said:\n%s\nguest, %v:\n%s", fio.Output(), err, dmesg)
		}
	}()
	written := 0 // sectors
	for round := range 3 {
		// Each time some more has been written, so that no round is the same.
		g.Must(t, fmt.Sprintf(find+"written() { awk '{print $7}' $stat; }; await '[ $(written) -gt %d ]'", written+2000))
		if _, err := fmt.Sscan(g.Must(t, find+"awk '{print $7}' $stat"), &written); err != nil {
			t.Fatal(err)
		}
		target.kill()
		g.Must(t, find+"await grep -q connecting $state")
		select {
		case <-fio.Done():
			t.Fatalf("round %d: fio ended while the target was away:\n%s", round, fio.Output())
		default:
		}
		target.start(t)
		g.Must(t, find+"await grep -q live $state")
	}
	code, err := fio.Wait(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if out := fio.Output(); code != 0 || !strings.Contains(out, "err= 0") {
		t.Errorf("fio: status %d\n%s", code, out)
	}
	if out := g.Must(t, "dmesg"); strings.Contains(out, "I/O error") {
		t.Errorf("the kernel had errors:\n%s", out)
	}
	t.Log(summary(fio.Output()))
	// What was added and removed by RPC comes and goes in the guest.
	target.must(t, "bdev_malloc_create", map[string]any{"name": "m0", "num_blocks": 32768, "block_size": 512, "uuid": extraUUID})
	target.must(t, "nvmf_subsystem_add_ns", map[string]any{"nqn": subNQN, "namespace": map[string]any{"bdev_name": "m0", "nsid": 7}})
	if out := g.Must(t, "blockdev --getsize64 $(nvme_device "+extraUUID+")"); out != "16777216\n" {
		t.Errorf("the new disk has %s bytes", out)
	}
	target.must(t, "nvmf_subsystem_remove_ns", map[string]any{"nqn": subNQN, "nsid": 7})
	g.Must(t, "await '! grep -q "+extraUUID+" /sys/block/nvme*n*/uuid'; nvme disconnect -n "+subNQN)
}

const extraUUID = "0d1c7f9e-6a53-4d55-9f0c-2f7f4ce33d11"
