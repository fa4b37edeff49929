package target_test

import (
	"encoding/json"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"github.com/thaw-project/thaw/target"
	"github.com/thaw-project/thaw/target/rpc"
)

// FuzzMethods calls methods with arbitrary parameters, in sequence on one target. None may
// panic, every failure is an answer, and afterwards lists are still given. Methods that
// reach out of the process are left out.
func FuzzMethods(f *testing.F) {
	var names []string
	o := target.Options{Root: shortDir(f), MallocBytes: 1 << 28, Log: slog.New(slog.DiscardHandler)}
	first, err := target.New(o)
	if err != nil {
		f.Fatal(err)
	}
	for name := range first.Methods() {
		if !strings.Contains(name, "aio") && !strings.HasPrefix(name, "nbd") && !strings.HasPrefix(name, "ublk") && !strings.Contains(name, "nvme_") && !strings.Contains(name, "listener") {
			names = append(names, name)
		}
	}
	first.Close()
	slices.Sort(names)
	add := func(calls ...string) {
		f.Add(strings.Join(calls, "\n"))
	}
	base := []string{
		`bdev_malloc_create {"name":"m","num_blocks":65536,"block_size":512,"uuid":"11111111-2222-3333-4444-555555555555"}`,
		`bdev_lvol_create_lvstore {"bdev_name":"m","lvs_name":"l","cluster_sz":16384}`,
		`bdev_lvol_create {"lvol_name":"a","size_in_mib":1,"thin_provision":true,"lvs_name":"l"}`,
		`bdev_malloc_create {"name":"o","num_blocks":2048,"block_size":512}`,
	}
	add(append(base, `bdev_lvol_snapshot {"lvol_name":"l/a","snapshot_name":"s"}`, `bdev_lvol_clone {"snapshot_name":"l/s","clone_name":"c"}`,
		`bdev_lvol_set_parent {"lvol_name":"l/a","parent_name":"l/s"}`, `bdev_lvol_decouple_parent {"name":"l/c"}`, `bdev_lvol_delete {"name":"l/s"}`)...)
	add(append(base, `bdev_lvol_clone_bdev {"bdev":"o","lvs_name":"l","clone_name":"e"}`, `bdev_lvol_snapshot {"lvol_name":"l/e","snapshot_name":"s"}`,
		`bdev_malloc_delete {"name":"o"}`, `bdev_lvol_inflate {"name":"l/e"}`, `bdev_lvol_delete {"name":"l/s"}`, `bdev_lvol_set_parent_bdev {"lvol_name":"l/a","parent_name":"o"}`)...)
	add(append(base, `nvmf_create_subsystem {"nqn":"nqn.2014-08.org.example:a","max_namespaces":1}`, `nvmf_subsystem_add_ns {"nqn":"nqn.2014-08.org.example:a","namespace":{"bdev_name":"l/a","nsid":1}}`,
		`nvmf_create_transport {"trtype":"TCP","max_io_size":4096}`, `bdev_lvol_resize {"name":"l/a","size_in_mib":2}`, `bdev_lvol_rename {"old_name":"l/a","new_name":"b"}`,
		`nvmf_subsystem_add_host {"nqn":"nqn.2014-08.org.example:a","host":"nqn.2014-08.org.example:h"}`, `bdev_lvol_delete_lvstore {"lvs_name":"l"}`)...)
	f.Fuzz(func(t *testing.T, calls string) {
		o.Root = shortDir(t)
		tg, err := target.New(o)
		if err != nil {
			t.Fatal(err)
		}
		defer tg.Close()
		methods := tg.Methods()
		call := func(name, params string) error {
			var raw json.RawMessage
			if params != "" {
				if raw = json.RawMessage(params); !json.Valid(raw) || len(params) > 4096 {
					return nil
				}
			}
			r, err := methods[name].Handle(t.Context(), raw)
			if err == nil {
				_, err = json.Marshal(r)
			}
			var e *rpc.Error
			if err != nil && (!errors.As(err, &e) || e.Code == 0 || e.Message == "") {
				t.Fatalf("%s %s: %v is no answer", name, params, err)
			}
			return err
		}
		for i, line := range strings.Split(calls, "\n") {
			name, params, _ := strings.Cut(line, " ")
			if i > 20 || !slices.Contains(names, name) || strings.Contains(params, `"timeout"`) {
				continue
			}
			call(name, params)
		}
		for _, name := range []string{"bdev_get_bdevs", "bdev_lvol_get_lvols", "bdev_lvol_get_lvstores", "nvmf_get_subsystems"} {
			if err := call(name, ""); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
	})
}
