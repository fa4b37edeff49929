package guest_test

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/thaw-project/thaw/e2e/guest"
	"github.com/thaw-project/thaw/lvol"
	"github.com/thaw-project/thaw/target/nbd"
)

// TestNBDByLinux drives our NBD server on this machine with Linux's client in the guest.
func TestNBDByLinux(t *testing.T) {
	g := guest.New(t, guest.Options{Modules: []string{"nbd", "ext4"}})
	store := newPool(t)
	defer store.Close()
	disk, err := store.OpenLvol("disk", false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Create("base", 8<<20); err != nil {
		t.Fatal(err)
	}
	fillLvol(t, store, "base")
	if _, err := store.SetReadOnly("base", true); err != nil {
		t.Fatal(err)
	}
	base, err := store.OpenLvol("base", true)
	if err != nil {
		t.Fatal(err)
	}
	server := nbd.New(nbd.Config{})
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := server.Shutdown(ctx); err != nil {
			t.Error(err)
		}
	}()
	for _, e := range []nbd.Export{{Name: "disk", Device: disk}, {Name: "base", Device: base}} {
		if err := server.AddExport(e); err != nil {
			t.Fatal(err)
		}
	}
	address, err := server.ListenTCP(anyAddress)
	if err != nil {
		t.Fatal(err)
	}
	_, port, err := net.SplitHostPort(address.String())
	if err != nil {
		t.Fatal(err)
	}
	connect := func(export string, connections int) string {
		return fmt.Sprintf("nbd-client %s %s /dev/nbd0 -N %s -b 512 -C %d\nawait '[ $(blockdev --getsize64 /dev/nbd0) -gt 0 ]'\n",
			guest.HostAddress, port, export, connections)
	}
	const disconnect = "nbd-client -d /dev/nbd0; await '[ $(blockdev --getsize64 /dev/nbd0) = 0 ]'\n"

	t.Run("list", func(t *testing.T) {
		out := g.Must(t, fmt.Sprintf("nbd-client -l %s %s", guest.HostAddress, port))
		if !strings.Contains(out, "disk\n") || !strings.Contains(out, "base\n") {
			t.Errorf("nbd-client -l:\n%s", out)
		}
	})
	t.Run("ext4", func(t *testing.T) {
		out := g.Must(t, connect("disk", 1)+`blockdev --getsize64 /dev/nbd0
			mkfs.ext4 -q /dev/nbd0
			mount /dev/nbd0 /mnt
			dd if=/dev/urandom of=/mnt/a bs=64k count=160 conv=fsync status=none
			cp /mnt/a /mnt/b; rm /mnt/a; cp -a /usr/sbin/ip /etc /mnt
			fstrim -v /mnt; sha256sum /mnt/b >/tmp/sum; umount /mnt
			e2fsck -f -n /dev/nbd0
			`+disconnect+connect("disk", 4)+`
			mount /dev/nbd0 /mnt; sha256sum -c /tmp/sum; cmp /mnt/ip /usr/sbin/ip; umount /mnt
			`+disconnect)
		if !strings.Contains(out, fmt.Sprintf("%d\n", lvolBytes)) || !strings.Contains(out, "/mnt/b: OK") || !strings.Contains(out, "trimmed") {
			t.Errorf("ext4:\n%s", out)
		}
	})
	t.Run("fio over four connections", func(t *testing.T) {
		out := g.MustWithin(t, 5*time.Minute, connect("disk", 4)+`fio --name=v --filename=/dev/nbd0 --ioengine=libaio --direct=1 --rw=randwrite \
			--bssplit=4k/60:512/10:32k/20:256k/10 --iodepth=16 --numjobs=2 --size=16m --offset_increment=128m --fsync=200 \
			--verify=crc32c --verify_fatal=1 --verify_state_save=0 2>&1
			`+disconnect)
		if strings.Count(out, "err= 0") != 2 {
			t.Errorf("fio:\n%s", out)
		}
		t.Log(summary(out))
	})
	t.Run("read-only", func(t *testing.T) {
		out := g.Must(t, connect("base", 2)+`cat /sys/block/nbd0/ro; head -c 20 /dev/nbd0
			! dd if=/dev/zero of=/dev/nbd0 bs=4k count=1 conv=fsync 2>/dev/null
			sha256sum /dev/nbd0; `+disconnect)
		if !strings.Contains(out, "1\n"+baseText) {
			t.Errorf("read-only:\n%s", out)
		}
	})
}

const baseText = "twenty bytes of text"

// fillLvol writes a text that begins at the start of an lvol and repeats.
func fillLvol(t *testing.T, store *lvol.Store, name string) {
	t.Helper()
	d, err := store.OpenLvol(name, false)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	text := bytes.Repeat([]byte(baseText), int(d.SizeBytes())/20+1)[:d.SizeBytes()]
	if _, err := d.WriteAt(text, 0); err != nil {
		t.Fatal(err)
	}
}
