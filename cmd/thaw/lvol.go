package main

import (
	"errors"
	"fmt"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/daemon"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol"
)

func newLvol() *cobra.Command {
	var where place
	cmd := group("lvol", "Work with logical volumes",
		lvolList(&where), lvolShow(&where), lvolCreate(&where), lvolSnapshot(&where), lvolClone(&where),
		lvolRename(&where), lvolResize(&where), lvolInflate(&where), lvolDecouple(&where), lvolDelete(&where),
		lvolCheck(&where), lvolPool(&where))
	where.register(cmd)
	return cmd
}

// call runs f with a client of the server's attacher, whose errors carry kinds.
func (p *place) call(cmd *cobra.Command, f func(attacherv1.AttacherClient) error) error {
	client, done, err := p.attacherClient(cmd.Context())
	if err != nil {
		return err
	}
	defer done()
	return f(client)
}

func printLvols(cmd *cobra.Command, out *output, lvols []*attacherv1.Lvol) error {
	return out.print(cmd.OutOrStdout(), lvols, func(w *tabwriter.Writer) {
		row(w, "NAME", "SIZE", "ALLOCATED", "CLUSTERS", "KIND", "PARENT", "CREATED")
		for _, l := range lvols {
			what := "lvol"
			if l.Snapshot {
				what = "snapshot"
			} else if l.Parent != "" {
				what = "clone"
			}
			if l.ReadOnly && !l.Snapshot {
				what += ",ro"
			}
			row(w, l.Name, bytesText(l.SizeBytes), bytesText(l.AllocatedClusters*l.ClusterBytes), l.AllocatedClusters,
				what, dash(l.Parent), ageText(l.CreatedUnixNanos))
		}
	})
}

// lvolVerb is a verb that answers with one lvol.
func lvolVerb(where *place, use, short, example string, args int, run func(*cobra.Command, attacherv1.AttacherClient, []string) (*attacherv1.Lvol, error)) *cobra.Command {
	var out output
	cmd := &cobra.Command{
		Use: use, Short: short, Example: example, Args: exactArgs(args),
		RunE: func(cmd *cobra.Command, a []string) error {
			return where.call(cmd, func(c attacherv1.AttacherClient) error {
				l, err := run(cmd, c, a)
				if err != nil {
					return unknown(err, "thaw lvol list")
				}
				return printLvols(cmd, &out, []*attacherv1.Lvol{l})
			})
		},
	}
	if !strings.HasPrefix(use, "create ") { // its first argument is a new name
		cmd.ValidArgsFunction = completeNames(where, lvolNames)
	}
	out.register(cmd)
	return cmd
}

func lvolList(where *place) *cobra.Command {
	return listing("List logical volumes with the clusters they own", "  thaw lvol list --json", func(cmd *cobra.Command, out *output) error {
		return where.call(cmd, func(c attacherv1.AttacherClient) error {
			r, err := c.ListLvols(cmd.Context(), &attacherv1.ListLvolsRequest{})
			if err != nil {
				return err
			}
			return printLvols(cmd, out, r.Lvols)
		})
	})
}

func lvolShow(where *place) *cobra.Command {
	return lvolVerb(where, "inspect NAME", "Show one logical volume", "  thaw lvol inspect soldier-f64acdbb-4255-4999-81f8-652e1741120f --json", 1,
		func(cmd *cobra.Command, c attacherv1.AttacherClient, a []string) (*attacherv1.Lvol, error) {
			return c.GetLvol(cmd.Context(), &attacherv1.GetLvolRequest{Name: a[0]})
		})
}

func lvolCreate(where *place) *cobra.Command {
	return lvolVerb(where, "create NAME SIZE", "Create a thin logical volume", "  thaw lvol create scratch 10GiB", 2,
		func(cmd *cobra.Command, c attacherv1.AttacherClient, a []string) (*attacherv1.Lvol, error) {
			size, err := daemon.ParseSize(a[1])
			if err != nil {
				return nil, err
			}
			return c.CreateLvol(cmd.Context(), &attacherv1.CreateLvolRequest{Name: a[0], SizeBytes: size})
		})
}

func lvolSnapshot(where *place) *cobra.Command {
	return lvolVerb(where, "snapshot NAME SNAPSHOT", "Freeze what a volume holds as a snapshot", "  thaw lvol snapshot scratch scratch-monday", 2,
		func(cmd *cobra.Command, c attacherv1.AttacherClient, a []string) (*attacherv1.Lvol, error) {
			return c.SnapshotLvol(cmd.Context(), &attacherv1.SnapshotLvolRequest{Lvol: a[0], Snapshot: a[1]})
		})
}

func lvolClone(where *place) *cobra.Command {
	return lvolVerb(where, "clone SNAPSHOT NAME", "Make a writable thin clone of a snapshot", "  thaw lvol clone scratch-monday experiment", 2,
		func(cmd *cobra.Command, c attacherv1.AttacherClient, a []string) (*attacherv1.Lvol, error) {
			return c.CloneLvol(cmd.Context(), &attacherv1.CloneLvolRequest{Snapshot: a[0], Name: a[1]})
		})
}

func lvolRename(where *place) *cobra.Command {
	return lvolVerb(where, "rename NAME NEW-NAME", "Rename a volume", "  thaw lvol rename experiment result", 2,
		func(cmd *cobra.Command, c attacherv1.AttacherClient, a []string) (*attacherv1.Lvol, error) {
			return c.RenameLvol(cmd.Context(), &attacherv1.RenameLvolRequest{Name: a[0], NewName: a[1]})
		})
}

func lvolResize(where *place) *cobra.Command {
	return lvolVerb(where, "resize NAME SIZE", "Change a volume's size", "  thaw lvol resize scratch 20GiB", 2,
		func(cmd *cobra.Command, c attacherv1.AttacherClient, a []string) (*attacherv1.Lvol, error) {
			size, err := daemon.ParseSize(a[1])
			if err != nil {
				return nil, err
			}
			return c.ResizeLvol(cmd.Context(), &attacherv1.ResizeLvolRequest{Name: a[0], SizeBytes: size})
		})
}

func lvolInflate(where *place) *cobra.Command {
	return lvolVerb(where, "inflate NAME", "Allocate everything and depend on no parent", "  thaw lvol inflate experiment", 1,
		func(cmd *cobra.Command, c attacherv1.AttacherClient, a []string) (*attacherv1.Lvol, error) {
			return c.InflateLvol(cmd.Context(), &attacherv1.InflateLvolRequest{Name: a[0]})
		})
}

func lvolDecouple(where *place) *cobra.Command {
	return lvolVerb(where, "decouple NAME", "Copy what is shared with the parent and drop the tie", "  thaw lvol decouple experiment", 1,
		func(cmd *cobra.Command, c attacherv1.AttacherClient, a []string) (*attacherv1.Lvol, error) {
			return c.DecoupleLvol(cmd.Context(), &attacherv1.DecoupleLvolRequest{Name: a[0]})
		})
}

func lvolDelete(where *place) *cobra.Command {
	var out output
	cmd := &cobra.Command{
		Use: "delete NAME", Short: "Delete a volume and free what only it uses", Args: exactArgs(1),
		Example: "  thaw lvol delete experiment",
		RunE: func(cmd *cobra.Command, a []string) error {
			return where.call(cmd, func(c attacherv1.AttacherClient) error {
				// A person who deletes what is not there has mistyped.
				l, err := c.GetLvol(cmd.Context(), &attacherv1.GetLvolRequest{Name: a[0]})
				if err != nil {
					return unknown(err, "thaw lvol list")
				}
				_, err = c.DeleteLvol(cmd.Context(), &attacherv1.DeleteLvolRequest{Name: a[0]})
				if n := len(l.Clones); n > 0 && errors.Is(err, kind.InUse) {
					return fmt.Errorf("%w: delete or decouple them first: %s", err, strings.Join(l.Clones[:min(n, 5)], ", "))
				}
				if err != nil {
					return err
				}
				return out.print(cmd.OutOrStdout(), map[string]string{"deleted": a[0]}, func(w *tabwriter.Writer) { row(w, "deleted", a[0]) })
			})
		},
	}
	cmd.ValidArgsFunction = completeNames(where, lvolNames)
	out.register(cmd)
	return cmd
}

func lvolPool(where *place) *cobra.Command {
	var out output
	cmd := &cobra.Command{
		Use: "pool", Short: "Show the pool's size and free space", Args: noArgs,
		Example: "  thaw lvol pool --json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return where.call(cmd, func(c attacherv1.AttacherClient) error {
				s, err := c.GetStore(cmd.Context(), &attacherv1.GetStoreRequest{})
				if err != nil {
					return err
				}
				return out.print(cmd.OutOrStdout(), s, func(w *tabwriter.Writer) {
					row(w, "UUID", "TARGET", "CLUSTER", "SIZE", "FREE")
					row(w, s.Uuid, s.Target, bytesText(s.ClusterBytes), bytesText(s.TotalClusters*s.ClusterBytes), bytesText(s.FreeClusters*s.ClusterBytes))
				})
			})
		},
	}
	out.register(cmd)
	return cmd
}

func lvolCheck(where *place) *cobra.Command {
	var out output
	var repair, scrub bool
	cmd := &cobra.Command{
		Use: "check", Short: "Find leaks, double use and damage in the pool", Args: noArgs,
		Long: `Find leaks (clusters that nothing uses), double use and damage in the pool.

Works while the server runs and when it does not. --scrub also reads all data and
verifies its checksums. --repair gives leaked clusters back. Exit status 7 means
that problems remain. Blocks that no image names are no problem: 'thaw image prune'
deletes them.`,
		Example: "  thaw lvol check --scrub --json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			report, err := checkStore(cmd, where, repair, scrub)
			if err != nil {
				return err
			}
			if err := printCheck(cmd, &out, report); err != nil {
				return err
			}
			remain := int(report.MoreProblems)
			for _, p := range report.Problems {
				if !p.Repaired {
					remain++
				}
			}
			if remain > 0 {
				return kind.Errorf(kind.Corrupt, "%s in the pool: 'thaw lvol check --repair' gives leaked clusters back; convert images with damaged blocks again", count(remain, "problem", "problems"))
			}
			return nil
		},
	}
	out.register(cmd)
	cmd.Flags().BoolVar(&repair, "repair", false, "give leaked clusters back")
	cmd.Flags().BoolVar(&scrub, "scrub", false, "read all data and verify checksums")
	return cmd
}

func printCheck(cmd *cobra.Command, out *output, r *attacherv1.CheckStoreResponse) error {
	return out.print(cmd.OutOrStdout(), r, func(w *tabwriter.Writer) {
		read := ""
		if r.ScrubbedBytes > 0 {
			read = bytesText(r.ScrubbedBytes) + " read, "
		}
		fmt.Fprintf(w, "%s checked, %s%s\n", count(int(r.CheckedClusters), "cluster", "clusters"), read,
			count(len(r.Problems)+int(r.MoreProblems), "problem", "problems"))
		for _, p := range r.Problems {
			state := ""
			if p.Repaired {
				state = "repaired"
			}
			row(w, p.Type, dash(p.Lvol), p.OffsetBytes, p.Detail, state)
		}
		if r.MoreProblems > 0 {
			fmt.Fprintf(w, "and %d more\n", r.MoreProblems)
		}
		if n := len(r.ReusableBlocks); n > 0 {
			fmt.Fprintf(w, "%s: 'thaw image prune' deletes them\n", count(n, "block that no image names", "blocks that no image names"))
		}
	})
}

// checkStore asks the server, or opens the pool itself when no server runs.
func checkStore(cmd *cobra.Command, where *place, repair, scrub bool) (*attacherv1.CheckStoreResponse, error) {
	var r *attacherv1.CheckStoreResponse
	err := where.call(cmd, func(c attacherv1.AttacherClient) (err error) {
		r, err = c.CheckStore(cmd.Context(), &attacherv1.CheckStoreRequest{Repair: repair, Scrub: scrub})
		return err
	})
	if !errors.Is(err, kind.Unavailable) {
		return r, err
	}
	config, lerr := where.load()
	if lerr != nil {
		return nil, lerr
	}
	if config.Pool.Backend != daemon.BackendEmbedded {
		return nil, err // the pool is the target's, and only the attacher knows what to make of it
	}
	store, err := daemon.OpenPool(config, nil)
	if err != nil {
		return nil, err
	}
	defer store.Close()
	report, err := store.Check(cmd.Context(), lvol.CheckOptions{Repair: repair, Scrub: scrub})
	if err != nil {
		return nil, err
	}
	return daemon.CheckReport(report), nil
}
