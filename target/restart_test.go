package target_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/spdk"
	"github.com/thaw-project/thaw/target"
	"github.com/thaw-project/thaw/target/bdev"
)

// TestKill kills a target as SPDK is killed: lvstores come back with the bdev, all else
// is gone.
func TestKill(t *testing.T) {
	root := shortDir(t)
	disk := file(t, root, "disk", 256*mib)
	l := spawn(t, root, false)
	l.call("bdev_aio_create", `{"name":"aio0","filename":%q,"block_size":512}`, disk)
	l.call("bdev_malloc_create", `{"name":"mem","num_blocks":8,"block_size":512}`)
	store := l.call("bdev_lvol_create_lvstore", `{"bdev_name":"aio0","lvs_name":"lvs","cluster_sz":65536}`)
	a := l.call("bdev_lvol_create", `{"lvol_name":"a","size_in_mib":16,"lvs_name":"lvs"}`)
	port := freePort(t)
	l.export(port, "lvs/a")
	h := connect(t, port)
	d := l.open(h, "lvs/a")
	write(t, d, 0, bytes.Repeat([]byte{'a'}, mib)) // never flushed
	s := l.call("bdev_lvol_snapshot", `{"lvol_name":"lvs/a","snapshot_name":"s"}`)
	write(t, d, 0, bytes.Repeat([]byte{'b'}, mib))
	before := l.answer("bdev_lvol_get_lvols", "")
	l.kill()
	h.Close()

	l = spawn(t, root, false)
	if got := l.answer("bdev_get_bdevs", ""); got != "[]" {
		t.Errorf("left: %s", got)
	}
	if got := l.answer("nvmf_get_transports", ""); got != "[]" {
		t.Errorf("left: %s", got)
	}
	l.call("bdev_aio_create", `{"name":"other","filename":%q,"block_size":512}`, disk)
	if got := l.answer("bdev_lvol_get_lvols", ""); got != before {
		t.Errorf("lvols are\n%s, were\n%s", got, before)
	}
	if got := l.answer("bdev_lvol_get_lvstores", ""); !strings.Contains(got, store) {
		t.Errorf("lvstores are %s", got)
	}
	l.export(port, a, s)
	h = connect(t, port)
	expect(t, l.open(h, "lvs/a"), 0, mib, 'b')
	expect(t, l.open(h, "lvs/s"), 0, mib, 'a')
}

// state is all that a target shows, but for what a restart may change.
func (l *lab) state() string {
	l.t.Helper()
	var b strings.Builder
	for _, m := range []string{"bdev_get_bdevs", "bdev_lvol_get_lvols", "bdev_lvol_get_lvstores", "nvmf_get_transports", "nvmf_get_subsystems", "bdev_nvme_get_controllers"} {
		var list []json.RawMessage // in whatever order things came
		l.into(&list, m, "")
		slices.SortFunc(list, func(a, b json.RawMessage) int { return bytes.Compare(a, b) })
		for _, one := range list {
			fmt.Fprintf(&b, "%s: %s\n", m, changing.ReplaceAll(one, nil))
		}
	}
	return b.String()
}

// changing is what the far target chooses, and what I/O changes.
var changing = regexp.MustCompile(`"(cntlid|num_allocated_clusters|free_clusters)":[0-9]+,`)

// TestPersist kills a target that keeps its configuration, and finds all of it again.
// A host that stays connected sees a pause and no error.
func TestPersist(t *testing.T) {
	far := start(t, target.Options{})
	far.call("bdev_malloc_create", `{"name":"m","num_blocks":8192,"block_size":512}`)
	farPort := freePort(t)
	far.export(farPort, "m")
	root := shortDir(t)
	disk := file(t, root, "disk", 256*mib)
	l := spawn(t, root, true)
	l.call("bdev_aio_create", `{"name":"aio0","filename":%q,"block_size":512}`, disk)
	l.call("bdev_malloc_create", `{"num_blocks":8192,"block_size":512}`)
	l.call("bdev_lvol_create_lvstore", `{"bdev_name":"aio0","lvs_name":"lvs","cluster_sz":65536}`)
	l.call("bdev_lvol_create", `{"lvol_name":"a","size_in_mib":16,"thin_provision":true,"lvs_name":"lvs"}`)
	l.call("bdev_nvme_attach_controller", attach("r", farPort, `,"ctrlr_loss_timeout_sec":-1,"reconnect_delay_sec":1`))
	port := freePort(t)
	l.export(port, "lvs/a", "Malloc0", "rn1")
	l.call("nvmf_create_subsystem", `{"nqn":"nqn.2014-08.org.example:closed","serial_number":"S1","min_cntlid":5,"max_cntlid":9}`)
	l.call("nvmf_subsystem_add_host", `{"nqn":"nqn.2014-08.org.example:closed","host":"nqn.2014-08.org.example:friend"}`)
	l.call("nvmf_create_subsystem", `{"nqn":"nqn.2014-08.org.example:gone","allow_any_host":true}`)
	l.call("nvmf_subsystem_add_host", `{"nqn":"nqn.2014-08.org.example:gone","host":"nqn.2014-08.org.example:friend"}`)
	l.call("nvmf_delete_subsystem", `{"nqn":"nqn.2014-08.org.example:gone"}`)
	l.call("nvmf_create_subsystem", `{"nqn":"nqn.2014-08.org.example:open"}`)
	l.call("nvmf_subsystem_allow_any_host", `{"nqn":"nqn.2014-08.org.example:open","allow_any_host":true}`)
	h := connect(t, port)
	d := l.open(h, "lvs/a")
	stop := load(t, d, 8*mib, 4)
	defer stop()
	for round := range 4 {
		write(t, d, int64(round)*mib, bytes.Repeat([]byte{byte('a' + round)}, mib))
		before := l.state()
		if round%2 == 1 {
			l.proc.Process.Signal(syscall.SIGTERM)
			l.stop()
		} else {
			l.kill()
		}
		l = spawn(t, root, true)
		eventually(t, "all is restored", func() bool { return l.state() == before })
		for i := range round + 1 {
			expect(t, d, int64(i)*mib, mib, byte('a'+i))
		}
	}
}

// load writes blocks from off on and reads them back, on goroutines of its own, until the
// returned function is called. An error or another's bytes fail the test.
func load(t *testing.T, d bdev.Device, off int64, workers int) (stop func()) {
	ended := make(chan struct{})
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			want, got := make([]byte, 4096), make([]byte, 4096)
			for i := 0; ; i++ {
				select {
				case <-ended:
					t.Logf("worker %d did %d rounds", w, i)
					return
				default:
				}
				at := off + int64(w)*mib + int64(i%64)*4096
				for j := range want {
					want[j] = byte(i + j + w)
				}
				if _, err := d.WriteAt(want, at); err != nil {
					t.Errorf("worker %d write %d: %v", w, i, err)
					return
				}
				if n, err := d.ReadAt(got, at); n != len(got) || !bytes.Equal(got, want) {
					t.Errorf("worker %d read %d: %d bytes, %v, or not what was written", w, i, n, err)
					return
				}
			}
		})
	}
	return sync.OnceFunc(func() { close(ended); wg.Wait() })
}

// TestPersistStorm kills a target at random moments between calls that create and
// remove, and checks that what was answered holds, and that what was not can be called
// again.
func TestPersistStorm(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 3))
	root := shortDir(t)
	disk := file(t, root, "disk", 64*mib)
	l := spawn(t, root, true)
	l.call("bdev_aio_create", `{"name":"aio0","filename":%q,"block_size":512}`, disk)
	l.call("bdev_lvol_create_lvstore", `{"bdev_name":"aio0","lvs_name":"lvs","cluster_sz":65536}`)
	l.call("nvmf_create_transport", `{"trtype":"TCP"}`)
	ports := []string{freePort(t), freePort(t), freePort(t)}
	// Pairs of calls that make and remove a thing, and that depend on those before.
	type thing struct {
		make, remove [2]string
		needs        []int
	}
	sub := func(i int) string { return fmt.Sprintf("nqn.2014-08.org.example:s%d", i) }
	var things []thing
	for i := range 3 {
		v := len(things)
		things = append(things,
			thing{[2]string{"bdev_lvol_create", fmt.Sprintf(`{"lvol_name":"v%d","size_in_mib":1,"thin_provision":%v,"lvs_name":"lvs"}`, i, i == 0)}, [2]string{"bdev_lvol_delete", fmt.Sprintf(`{"name":"lvs/v%d"}`, i)}, nil},
			thing{[2]string{"nvmf_create_subsystem", `{"nqn":"` + sub(i) + `"}`}, [2]string{"nvmf_delete_subsystem", `{"nqn":"` + sub(i) + `"}`}, nil},
			thing{[2]string{"nvmf_subsystem_add_ns", `{"nqn":"` + sub(i) + `","namespace":{"bdev_name":"lvs/v` + fmt.Sprint(i) + `","nsid":1}}`}, [2]string{"nvmf_subsystem_remove_ns", `{"nqn":"` + sub(i) + `","nsid":1}`}, []int{v, v + 1}},
			thing{[2]string{"nvmf_subsystem_add_host", `{"nqn":"` + sub(i) + `","host":"nqn.2014-08.org.example:h"}`}, [2]string{"nvmf_subsystem_remove_host", `{"nqn":"` + sub(i) + `","host":"nqn.2014-08.org.example:h"}`}, []int{v + 1}},
			thing{[2]string{"nvmf_subsystem_add_listener", `{"nqn":"` + sub(i) + `","listen_address":{"trtype":"TCP","traddr":"127.0.0.1","trsvcid":"` + ports[i] + `"}}`}, [2]string{"nvmf_subsystem_remove_listener", `{"nqn":"` + sub(i) + `","listen_address":{"trtype":"TCP","traddr":"127.0.0.1","trsvcid":"` + ports[i] + `"}}`}, []int{v + 1}},
			thing{[2]string{"bdev_malloc_create", fmt.Sprintf(`{"name":"m%d","num_blocks":8,"block_size":512}`, i)}, [2]string{"bdev_malloc_delete", fmt.Sprintf(`{"name":"m%d"}`, i)}, nil},
		)
	}
	there := make([]bool, len(things))
	seen := func() (s []bool) {
		subsystems, bdevs := l.answer("nvmf_get_subsystems", ""), l.answer("bdev_get_bdevs", "")
		var list []struct {
			NQN        string
			Hosts      []any
			Listeners  []any `json:"listen_addresses"`
			Namespaces []any
		}
		if err := json.Unmarshal([]byte(subsystems), &list); err != nil {
			t.Fatal(err)
		}
		for i := range 3 {
			var hosts, listeners, namespaces bool
			exists := false
			for _, one := range list {
				if one.NQN == sub(i) {
					exists, hosts, listeners, namespaces = true, len(one.Hosts) > 0, len(one.Listeners) > 0, len(one.Namespaces) > 0
				}
			}
			s = append(s, strings.Contains(bdevs, fmt.Sprintf(`"lvs/v%d"`, i)), exists, namespaces, hosts, listeners, strings.Contains(bdevs, fmt.Sprintf(`"m%d"`, i)))
		}
		return s
	}
	// drop says that a thing is gone, and what needed it.
	var drop func(i int)
	drop = func(i int) {
		there[i] = false
		for j, o := range things {
			for _, n := range o.needs {
				if n == i && there[j] {
					drop(j)
				}
			}
		}
	}
	rounds := 12
	if testing.Short() {
		rounds = 4
	}
	for round := range rounds {
		// One goroutine calls; the kill comes at a random moment.
		killed := make(chan struct{})
		victim := l
		delay := time.Duration(r.Int64N(int64(60 * time.Millisecond)))
		go func() {
			time.Sleep(delay)
			victim.proc.Process.Signal(syscall.SIGKILL)
			close(killed)
		}()
		unsure := -1
		for unsure < 0 {
			i := r.IntN(len(things))
			ok := true
			for _, n := range things[i].needs {
				ok = ok && there[n]
			}
			if !ok && !there[i] {
				continue
			}
			call := things[i].make
			if there[i] {
				call = things[i].remove
			}
			_, err := l.try(call[0], call[1])
			var e *spdk.Error
			switch {
			case errors.As(err, &e):
				t.Fatalf("round %d: %v: %v", round, call, err)
			case err != nil: // killed: nobody knows
				unsure = i
			case there[i]:
				drop(i)
			default:
				there[i] = true
			}
		}
		<-killed
		l.stop()
		l = spawn(t, root, true)
		was := there[unsure]
		var now []bool
		eventually(t, "what was answered is there", func() bool {
			now = seen()
			for i := range things {
				if i != unsure && now[i] != there[i] && !(was && !now[unsure] && needs(things[i].needs, unsure)) {
					return false
				}
			}
			return true
		})
		there[unsure] = now[unsure]
		if was && !now[unsure] {
			drop(unsure)
		}
	}
}

func needs(list []int, i int) bool {
	for _, n := range list {
		if n == i {
			return true
		}
	}
	return false
}

// TestPersistMissing starts without a file that is on record: what depends on it stays on
// record, comes when the file does, and can be removed before.
func TestPersistMissing(t *testing.T) {
	root := shortDir(t)
	disk, other := file(t, root, "disk", 64*mib), file(t, root, "other", 64*mib)
	l := spawn(t, root, true)
	l.call("bdev_aio_create", `{"name":"aio0","filename":%q,"block_size":512}`, disk)
	l.call("bdev_aio_create", `{"name":"aio1","filename":%q,"block_size":512}`, other)
	l.call("bdev_lvol_create_lvstore", `{"bdev_name":"aio0","lvs_name":"lvs","cluster_sz":65536}`)
	l.call("bdev_lvol_create", `{"lvol_name":"a","size_in_mib":1,"thin_provision":true,"lvs_name":"lvs"}`)
	port := freePort(t)
	l.export(port, "lvs/a", "aio1")
	before := l.state()
	l.kill()
	for _, f := range []string{disk, other} {
		if err := os.Rename(f, f+".away"); err != nil {
			t.Fatal(err)
		}
	}
	l = spawn(t, root, true)
	if got := l.answer("bdev_get_bdevs", ""); got != "[]" {
		t.Errorf("bdevs: %s", got)
	}
	// The listener waits for the disks for a while: a host that finds the subsystem
	// without its disk would drop the disk.
	var subs []struct {
		Listeners []any `json:"listen_addresses"`
	}
	l.into(&subs, "nvmf_get_subsystems", `{"nqn":%q}`, nqn)
	if len(subs[0].Listeners) != 0 {
		t.Error("a listener is there before the disks are")
	}
	l.call("bdev_aio_delete", `{"name":"aio1"}`)
	l.call("nvmf_subsystem_remove_ns", `{"nqn":%q,"nsid":2}`, nqn)
	l.fails(-19, "bdev_aio_delete", `{"name":"aio1"}`)
	if err := os.Rename(disk+".away", disk); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the lvol is exported again", func() bool {
		return strings.Contains(l.answer("nvmf_get_subsystems", ""), `"nsid":1`) && strings.Contains(l.answer("nvmf_get_subsystems", ""), port)
	})
	if after := l.state(); strings.Contains(after, "aio1") || !strings.Contains(before, "aio1") {
		t.Errorf("state is %s", after)
	}
	l.kill()
	// After the grace the listener opens for what there is.
	if err := os.Rename(disk, disk+".away"); err != nil {
		t.Fatal(err)
	}
	l = spawn(t, root, true)
	eventually(t, "the listener opens", func() bool { return strings.Contains(l.answer("nvmf_get_subsystems", ""), port) })
	l.kill()
	if log := l.log.String(); !strings.Contains(log, "not restored yet") || !strings.Contains(log, "disk") {
		t.Errorf("the log says nothing of it:\n%s", log)
	}
}

// TestUnfinished finds what calls left that were killed in the middle.
func TestUnfinished(t *testing.T) {
	root := shortDir(t)
	disk := file(t, root, "disk", 256*mib)
	rounds := 25
	if testing.Short() {
		rounds = 5
	}
	for i := range rounds {
		l := spawn(t, root, true)
		if i == 0 {
			l.call("bdev_aio_create", `{"name":"aio0","filename":%q,"block_size":512}`, disk)
		}
		l.try("bdev_lvol_create_lvstore", `{"bdev_name":"aio0","lvs_name":"lvs","cluster_sz":16384}`)
		done := make(chan struct{})
		go func() { // thick: it takes a while
			defer close(done)
			for j := 0; ; j++ {
				if _, err := l.try("bdev_lvol_create", fmt.Sprintf(`{"lvol_name":"t%d","size_in_mib":8,"lvs_name":"lvs"}`, j)); err != nil {
					return
				}
				if _, err := l.try("bdev_lvol_delete", fmt.Sprintf(`{"name":"lvs/t%d"}`, j)); err != nil {
					return
				}
			}
		}()
		time.Sleep(time.Duration(rand.Int64N(int64(40 * time.Millisecond))))
		l.kill()
		<-done
		l = spawn(t, root, true)
		var lvols []struct {
			Thin bool `json:"is_thin_provisioned"`
			N    int  `json:"num_allocated_clusters"`
		}
		l.into(&lvols, "bdev_lvol_get_lvols", "")
		for _, v := range lvols {
			if v.Thin || v.N != 512 {
				t.Errorf("an lvol is there that is not whole: %+v", v)
			}
		}
		var list []struct{ Alias string }
		l.into(&list, "bdev_lvol_get_lvols", "")
		for _, v := range list {
			l.call("bdev_lvol_delete", `{"name":%q}`, v.Alias)
		}
		l.kill()
	}
	entries, err := filepath.Glob(filepath.Join(root, "lvstore", "*"))
	if err != nil || len(entries) > 1+1 {
		t.Errorf("directories left: %v %v", entries, err)
	}
}

// TestUnfinishedExternal kills calls that make lvols over a disk outside: whatever is there
// afterwards shows that disk.
func TestUnfinishedExternal(t *testing.T) {
	root := shortDir(t)
	disk, parent := file(t, root, "disk", 64*mib), file(t, root, "parent", mib)
	if err := os.WriteFile(parent, bytes.Repeat([]byte{'p'}, mib), 0o600); err != nil {
		t.Fatal(err)
	}
	l := spawn(t, root, true)
	l.call("bdev_aio_create", `{"name":"parent","filename":%q,"block_size":512,"readonly":true}`, parent)
	l.call("bdev_aio_create", `{"name":"aio0","filename":%q,"block_size":512}`, disk)
	l.call("bdev_lvol_create_lvstore", `{"bdev_name":"aio0","lvs_name":"lvs","cluster_sz":16384}`)
	port := freePort(t)
	l.export(port)
	rounds := 25
	if testing.Short() {
		rounds = 5
	}
	for range rounds {
		done := make(chan struct{})
		victim := l
		go func() {
			defer close(done)
			for {
				for _, c := range [][2]string{
					{"bdev_lvol_clone_bdev", `{"bdev":"parent","lvs_name":"lvs","clone_name":"c"}`},
					{"bdev_lvol_snapshot", `{"lvol_name":"lvs/c","snapshot_name":"s"}`},
					{"bdev_lvol_clone", `{"snapshot_name":"lvs/s","clone_name":"d"}`},
					{"bdev_lvol_delete", `{"name":"lvs/c"}`},
					{"bdev_lvol_delete", `{"name":"lvs/s"}`},
					{"bdev_lvol_inflate", `{"name":"lvs/d"}`},
					{"bdev_lvol_delete", `{"name":"lvs/d"}`},
				} {
					_, err := victim.try(c[0], c[1])
					var e *spdk.Error
					if err != nil && !errors.As(err, &e) {
						return
					}
				}
			}
		}()
		time.Sleep(time.Duration(rand.Int64N(int64(60 * time.Millisecond))))
		l.kill()
		<-done
		l = spawn(t, root, true)
		eventually(t, "the listener is back", func() bool { return strings.Contains(l.answer("nvmf_get_subsystems", ""), port) })
		var list []struct{ Alias string }
		l.into(&list, "bdev_lvol_get_lvols", "")
		h := connect(t, port)
		for i, v := range list {
			l.call("nvmf_subsystem_add_ns", `{"nqn":%q,"namespace":{"bdev_name":%q,"nsid":%d}}`, nqn, v.Alias, i+1)
			eventually(t, "the host sees it", func() bool { _, err := h.Open(uint32(i + 1)); return err == nil })
			d, err := h.Open(uint32(i + 1))
			if err != nil {
				t.Fatal(err)
			}
			expect(t, d, 0, mib, 'p')
			l.call("nvmf_subsystem_remove_ns", `{"nqn":%q,"nsid":%d}`, nqn, i+1)
		}
		h.Close()
	}
}

// TestSecond refuses a second target in the same directory.
func TestSecond(t *testing.T) {
	l := start(t, target.Options{})
	if _, err := target.New(target.Options{Root: l.root}); !errors.Is(err, kind.InUse) || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
		t.Errorf("a second target: %v", err)
	}
	if _, err := target.New(target.Options{}); !errors.Is(err, kind.Invalid) {
		t.Errorf("no root: %v", err)
	}
}

// TestForeignRecord refuses a record of a newer program, and of another part.
func TestForeignRecord(t *testing.T) {
	root := shortDir(t)
	if err := os.WriteFile(filepath.Join(root, "target.db"), []byte("no database"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := target.New(target.Options{Root: root, Persist: true}); !errors.Is(err, kind.Corrupt) {
		t.Errorf("garbage: %v", err)
	}
	if tg, err := target.New(target.Options{Root: root}); err != nil {
		t.Errorf("without a record it does not matter: %v", err)
	} else {
		tg.Close()
	}
}
