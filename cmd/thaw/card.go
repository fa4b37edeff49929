package main

import (
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/daemon"
)

func newCard() *cobra.Command {
	var where place
	cmd := group("card", "See and change what a DPU shows to the host that it is plugged into",
		group("disk", "Work with the drives that the card shows", cardDiskList(&where), cardDiskAttach(&where), cardDiskDetach(&where)),
		group("function", "Look at the card's PCIe functions", cardFunctionList(&where)))
	where.register(cmd)
	return cmd
}

// callCard runs f with a client of the card's attacher, whose errors carry kinds.
func (p *place) callCard(cmd *cobra.Command, f func(attacherv1.CardClient) error) error {
	conn, err := p.part(cmd.Context(), daemon.RoleCard)
	if err != nil {
		return err
	}
	defer conn.Close()
	return f(attacherv1.NewCardClient(conn))
}

// purposes are what disks are called for on the command line.
var purposes = map[string]attacherv1.Purpose{
	"block":      attacherv1.Purpose_PURPOSE_BLOCK,
	"writable":   attacherv1.Purpose_PURPOSE_WRITABLE,
	"conversion": attacherv1.Purpose_PURPOSE_CONVERSION,
}

func parsePurpose(text string) (attacherv1.Purpose, error) {
	p, ok := purposes[text]
	if !ok {
		return p, usage{fmt.Errorf("--purpose %.40q: must be block, writable or conversion", text)}
	}
	return p, nil
}

func purposeText(p attacherv1.Purpose) string {
	for text, value := range purposes {
		if value == p {
			return text
		}
	}
	return "-"
}

func functionText(f *attacherv1.PcieFunction) string {
	return fmt.Sprintf("%d:%d:%d", f.GetPort(), f.GetPhysicalFunction(), f.GetVirtualFunction())
}

func printDisks(cmd *cobra.Command, out *output, disks []*attacherv1.CardDisk) error {
	return out.print(cmd.OutOrStdout(), disks, func(w *tabwriter.Writer) {
		row(w, "DISK", "PURPOSE", "FUNCTION", "SIZE", "SERIAL", "STATE", "CREATED")
		for _, d := range disks {
			state := "shown"
			if d.GetReadOnly() {
				state += ",ro"
			}
			if d.GetProblem() != "" {
				state = d.GetProblem()
			}
			row(w, d.GetId(), purposeText(d.GetPurpose()), functionText(d.GetFunction()), bytesText(d.GetSizeBytes()), d.GetSerial(), state, ageText(d.GetCreatedUnixNanos()))
		}
	})
}

func cardDiskList(where *place) *cobra.Command {
	return listing("List the drives that the card shows", "  thaw card disk list --json", func(cmd *cobra.Command, out *output) error {
		return where.callCard(cmd, func(c attacherv1.CardClient) error {
			r, err := c.ListDisks(cmd.Context(), &attacherv1.ListDisksRequest{})
			if err != nil {
				return err
			}
			return printDisks(cmd, out, r.GetDisks())
		})
	})
}

func cardDiskAttach(where *place) *cobra.Command {
	var out output
	var purpose string
	cmd := &cobra.Command{
		Use: "attach DISK VOLUME", Short: "Show a volume of the card's own target to the host", Args: exactArgs(2),
		Long: `Show a volume of the card's own target to the host, until it is detached.

VOLUME is its name at the card's bridge, as lvolStores/lvs0/lvols/data or
aioVolumes/aio0. Blocks of images are attached by image-mgmt: 'thaw block attach'.`,
		Example: "  thaw card disk attach data lvolStores/lvs0/lvols/data",
		RunE: func(cmd *cobra.Command, a []string) error {
			p, err := parsePurpose(purpose)
			if err != nil {
				return err
			}
			return where.callCard(cmd, func(c attacherv1.CardClient) error {
				d, err := c.AttachDisk(cmd.Context(), &attacherv1.AttachDiskRequest{
					Id: a[0], Purpose: p, Source: &attacherv1.AttachDiskRequest_Volume{Volume: a[1]},
				})
				if err != nil {
					return err
				}
				if err := printDisks(cmd, &out, []*attacherv1.CardDisk{d}); err != nil || out.json {
					return err
				}
				var steps []string
				for _, s := range d.GetSteps() {
					steps = append(steps, fmt.Sprintf("%s %s", s.GetStep(), time.Duration(s.GetNanos()).Round(10*time.Microsecond)))
				}
				if len(steps) > 0 {
					fmt.Fprintln(cmd.OutOrStdout(), strings.Join(steps, ", "))
				}
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&purpose, "purpose", "writable", "what it is for: block (read-only), writable or conversion")
	out.register(cmd)
	return cmd
}

func cardDiskDetach(where *place) *cobra.Command {
	var purpose string
	cmd := &cobra.Command{
		Use: "detach DISK", Short: "Take a drive away from the host", Args: exactArgs(1),
		Long: `Take a drive away from the host and give its function back. The host's kernel sees a
drive that was pulled out: unmount what is on it first. What image-mgmt uses it
attaches again.`,
		Example: "  thaw card disk detach data --purpose writable",
		RunE: func(cmd *cobra.Command, a []string) error {
			p, err := parsePurpose(purpose)
			if err != nil {
				return err
			}
			return where.callCard(cmd, func(c attacherv1.CardClient) error {
				if _, err := c.DetachDisk(cmd.Context(), &attacherv1.DetachDiskRequest{Id: a[0], Purpose: p}); err != nil {
					return err
				}
				fmt.Fprintln(cmd.OutOrStdout(), a[0])
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&purpose, "purpose", "writable", "what it is for: block, writable or conversion")
	return cmd
}

func cardFunctionList(where *place) *cobra.Command {
	return listing("List the card's PCIe functions and what each shows", "  thaw card function list", func(cmd *cobra.Command, out *output) error {
		return where.callCard(cmd, func(c attacherv1.CardClient) error {
			r, err := c.ListFunctions(cmd.Context(), &attacherv1.ListFunctionsRequest{})
			if err != nil {
				return err
			}
			return out.print(cmd.OutOrStdout(), r.GetFunctions(), func(w *tabwriter.Writer) {
				row(w, "FUNCTION", "DISK", "PURPOSE", "FOREIGN")
				for _, f := range r.GetFunctions() {
					row(w, functionText(f.GetFunction()), dash(f.GetId()), purposeText(f.GetPurpose()), dash(f.GetForeignNqn()))
				}
			})
		})
	})
}
