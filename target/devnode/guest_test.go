package devnode_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/thaw-project/thaw/e2e/guest"
)

// TestGuest shows lvols as /dev/nbd0 and /dev/ublkb0 in a kernel that has both, kills the
// target under a writer, and starts it again.
func TestGuest(t *testing.T) {
	dir := t.TempDir()
	thaw := filepath.Join(dir, "thaw")
	build := exec.Command("go", "build", "-o", thaw, "github.com/thaw-project/thaw/cmd/thaw")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	build.Stderr = os.Stderr
	if os.Getenv(guest.Environment) != "" {
		if err := build.Run(); err != nil {
			t.Fatal(err)
		}
	}
	g := guest.New(t, guest.Options{Modules: []string{"nbd", "ublk_drv"}, Files: map[string]string{"thaw": thaw}, ScratchMB: 1024})
	const begin = `
export PATH=$PATH:/host
call() { thaw target call "$1" ${2:+--params "$2"} --socket /scratch/sock; }
begin() {
	thaw target --root /scratch/root --socket /scratch/sock --persist 2>>/scratch/log & echo $! >/scratch/pid
	for i in $(seq 600); do [ -S /scratch/sock ] && return; sleep 0.1; done
	echo "the target did not start"; cat /scratch/log; exit 1
}
`
	g.Must(t, begin+`
set -e
truncate -s 512M /scratch/disk
begin
call bdev_aio_create '{"name":"aio0","filename":"/scratch/disk","block_size":512}'
call bdev_lvol_create_lvstore '{"bdev_name":"aio0","lvs_name":"lvs","cluster_sz":65536}'
for v in n u; do call bdev_lvol_create '{"lvol_name":"'$v'","size_in_mib":64,"thin_provision":true,"lvs_name":"lvs"}'; done
[ "$(call nbd_start_disk '{"bdev_name":"lvs/n","nbd_device":"/dev/nbd3"}')" = /dev/nbd3 ]
call ublk_create_target
[ "$(call ublk_start_disk '{"bdev_name":"lvs/u","ublk_id":5,"queue_depth":32}')" = 5 ]
call nbd_get_disks | grep /dev/nbd3
call ublk_get_disks | grep /dev/ublkb5
for d in /dev/nbd3 /dev/ublkb5; do
	mkfs.ext4 -q -F $d && mkdir -p /mnt$d && mount $d /mnt$d && head -c 8M /dev/urandom >/mnt$d/a && sync
done
`)
	// A writer that syncs goes on over the death of the target.
	for round := range 2 {
		g.Must(t, begin+fmt.Sprintf(`
for d in /dev/nbd3 /dev/ublkb5; do
	( for i in $(seq 20); do head -c 1M /dev/urandom >/mnt$d/w%d-$i && sync -f /mnt$d || exit 1; done; echo done >/scratch/done$(basename $d) ) 2>/scratch/err$(basename $d) &
	echo $! >/scratch/w$(basename $d)
done
sleep 1
kill -9 $(cat /scratch/pid); rm -f /scratch/sock
begin
for d in nbd3 ublkb5; do
	for i in $(seq 1200); do [ -d /proc/$(cat /scratch/w$d) ] || break; sleep 0.1; done
	[ "$(cat /scratch/done$d)" = done ] || { echo "the writer of $d failed"; cat /scratch/err$d; tail -20 /scratch/log; dmesg | tail -20; exit 1; }
	rm /scratch/done$d
done
`, round))
	}
	out := g.Must(t, begin+`
set -e
call bdev_get_bdevs '{"name":"lvs/n"}' | grep lvs/n
for d in /dev/nbd3 /dev/ublkb5; do
	sum=$(cat /mnt$d/[aw]* | md5sum); umount /mnt$d
	e2fsck -fn $d; mount $d /mnt$d; [ "$sum" = "$(cat /mnt$d/[aw]* | md5sum)" ]; umount /mnt$d
done
call nbd_stop_disk '{"nbd_device":"/dev/nbd3"}'
call ublk_stop_disk '{"ublk_id":5}'
call nbd_get_disks
call ublk_get_disks
[ ! -b /dev/ublkb5 ]
[ "$(cat /sys/block/nbd3/size)" = 0 ] || [ ! -e /sys/block/nbd3 ] || [ ! -e /sys/block/nbd3/pid ]
kill $(cat /scratch/pid)
`)
	t.Logf("%s", out)
}
